"""`SparseConv1D`: compact storage behind Hugging Face's `Conv1D`, a linear layer whose weight is [in, out]."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.kernels import Panels
from rarefy.nn.entries import replace_data
from rarefy.nn.linear import SparseLinear


class SparseConv1D(SparseLinear):
    """y = x · W + b with W [in_features, out_features] stored as values and indices.

    Everything is as in `SparseLinear`, with masks, dense gradients and the saved weight in the layout [in, out].

    Args:
        mask: bool [in_features, out_features], True = active.
        bias: whether there is a bias.
        dtype: of values and bias; the default dtype if None.

    Example:
        >>> layer = SparseConv1D(torch.ones(3, 2, dtype=torch.bool))
        >>> layer.weight.shape, layer.nx, layer.nf, layer(torch.ones(5, 3)).shape
        (torch.Size([3, 2]), 3, 2, torch.Size([5, 2]))
    """

    _own_attributes: ClassVar[tuple[str, ...]] = (
        *SparseLinear._own_attributes,
        "in_features",
        "out_features",
    )

    def __init__(self, mask: Tensor, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__(mask.t(), bias, dtype)
        self.nx, self.nf = self.in_features, self.out_features

    @classmethod
    def from_conv1d(cls, module: nn.Module, mask: Tensor) -> SparseConv1D:
        """The same layer with only the connections of `mask`.

        Args:
            module: any module with `weight` [in, out], `bias` and the meaning of Hugging Face's Conv1D.
            mask: bool, the shape of its weight.

        Raises:
            RarefyError: the module has no weight matrix; the mask has another shape.
        """
        weight: Any = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.dim() != 2:
            raise RarefyError(
                f"module: {type(module).__name__} is not allowed; give a Conv1D with a weight matrix"
            )
        layer = cls._from_dense(module, weight, mask)
        assert isinstance(layer, SparseConv1D)
        return layer

    @classmethod
    def take_over(cls, module: nn.Module, mask: Tensor) -> SparseConv1D:
        """Turns a `Conv1D` itself into a sparse one, in place; see `SparseLinear.take_over`."""
        layer: Any = module
        layer.in_features, layer.out_features = layer.nx, layer.nf
        converted = super().take_over(module, mask)
        assert isinstance(converted, SparseConv1D)
        return converted

    def give_back(self) -> nn.Module:
        """The reverse of `take_over`; a layer that never was a `Conv1D` becomes an `nn.Linear`."""
        if "_dense_class" in self.__dict__:
            return super().give_back()
        outs, ins = self.out_features, self.in_features
        layer: Any = super().give_back()
        parameter, grad = layer.weight, layer.weight.grad
        replace_data(parameter, parameter.data.t().contiguous())
        parameter.grad = None if grad is None else grad.t().contiguous()
        layer.in_features, layer.out_features = ins, outs
        del layer.nx, layer.nf
        return layer

    def to_conv1d(self, conv1d: type[nn.Module]) -> nn.Module:
        """A dense layer of the class `conv1d` (constructed as conv1d(out, in)) with exact zeros; shares the bias."""
        module = conv1d(self.nf, self.nx)
        module.weight = nn.Parameter(self.weight.detach(), requires_grad=self.values.requires_grad)
        module.bias = self.bias
        return module.train(self.training)

    @property
    def weight_shape(self) -> tuple[int, int]:
        """[in_features, out_features]."""
        return self.in_features, self.out_features

    @property
    def weight_mask(self) -> Tensor:
        """The mask [in_features, out_features]; built on each read."""
        return self.csr.mask().t().contiguous()

    def gather(self, matrix: Tensor) -> Tensor:
        """The entries of a tensor [in_features, out_features] at the active connections, in the order of `values`."""
        return super().gather(matrix.t())

    def scatter(self, entries: Tensor) -> Tensor:
        """The reverse of `gather`."""
        return super().scatter(entries).t().contiguous()

    def _as_weight(self, matrix: Tensor) -> Tensor:
        return matrix.t()

    def _csr_of(self, mask: Tensor) -> Panels:
        return Panels.from_mask(mask.t())
