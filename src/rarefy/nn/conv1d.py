"""`SparseConv1D`: Hugging Face's `Conv1D`, a linear layer whose weight is [in, out], born with a sparse weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.nn.linear import SparseLinear


class SparseConv1D(SparseLinear):
    """y = x · W + b with W [in_features, out_features], of which only the active connections are stored.

    Everything is as in `SparseLinear`, with masks and the weight in the layout [in, out].

    Args:
        mask: bool [in_features, out_features], True = active.
        bias: whether there is a bias.
        dtype: of weight and bias; the default dtype if None.

    Example:
        >>> layer = SparseConv1D(torch.ones(3, 2, dtype=torch.bool))
        >>> layer.weight.shape, layer.nx, layer.nf, layer(torch.ones(5, 3)).shape
        (torch.Size([3, 2]), 3, 2, torch.Size([5, 2]))
    """

    def __init__(self, mask: Tensor, bias: bool = True, dtype: torch.dtype | None = None) -> None:
        super().__init__(mask, False, dtype)
        self._turn()
        if bias:
            self.bias = nn.Parameter(torch.zeros(self.nf, dtype=dtype, device=mask.device))

    def _turn(self) -> None:
        """Names the sizes of a weight [in, out]."""
        self.nx, self.nf = self.weight.shape
        self.in_features, self.out_features = self.weight.shape

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
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer.register_parameter("weight", nn.Parameter(weight.detach().clone(), weight.requires_grad))
        layer.register_parameter("bias", module.bias)  # pyright: ignore[reportArgumentType]
        layer._take(mask)
        layer._turn()
        return layer.train(module.training)

    def forward(self, input: Tensor) -> Tensor:
        """X [..., in_features] -> [..., out_features]."""
        # `addmm` takes matrices alone, and adds the bias in the same pass.
        flat = input.reshape(-1, input.shape[-1])
        y = flat @ self.weight if self.bias is None else torch.addmm(self.bias, flat, self.weight)
        return y.view(*input.shape[:-1], self.nf)

    def to_linear(self) -> nn.Linear:
        """An `nn.Linear` that computes the same."""
        linear = nn.Linear(self.nx, self.nf, bias=False, device="meta")
        dense = self.weight.dense().t().contiguous()
        linear.weight = nn.Parameter(dense, requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def to_conv1d(self, conv1d: type[nn.Module]) -> nn.Module:
        """A dense layer of the class `conv1d` (constructed as conv1d(out, in)) with exact zeros; shares the bias."""
        module = conv1d(self.nf, self.nx)
        module.weight = nn.Parameter(self.weight.dense(), requires_grad=self.weight.requires_grad)
        module.bias = self.bias
        return module.train(self.training)
