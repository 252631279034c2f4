"""`SparseLinear`: an `nn.Linear` that is born with a sparse weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.nn.conversion import make_compact
from rarefy.tensors import SparseWeight, set_topology


class SparseLinear(nn.Linear):
    """y = x · Wᵀ + b where only the active connections of W are stored and computed with.

    `weight` is a `SparseWeight`: a parameter of the dense weight's shape, for optimizers, copies and initialisers as
    for any other code. `weight_mask` shows the active connections. State dicts and files are those of masked storage.

    Args:
        mask: bool [out_features, in_features], True = active.
        bias: whether there is a bias.
        dtype: of weight and bias; the default dtype if None.
        block: outputs and inputs of the blocks in which its masks come, if they do: multiples of 8 are stored and
            multiplied as whole blocks.

    Raises:
        RarefyError: the mask is not a bool matrix.

    Example:
        >>> layer = SparseLinear(torch.tensor([[True, False], [True, True]]), bias=False)
        >>> layer.weight.connections, layer.weight.shape, layer(torch.ones(5, 2)).shape
        (3, torch.Size([2, 2]), torch.Size([5, 2]))
    """

    weight: SparseWeight  # pyright: ignore[reportIncompatibleVariableOverride]
    weight_mask: Tensor

    def __init__(
        self,
        mask: Tensor,
        bias: bool = True,
        dtype: torch.dtype | None = None,
        block: tuple[int, int] | None = None,
    ) -> None:
        _check(mask)
        super().__init__(mask.shape[1], mask.shape[0], bias, mask.device, dtype)
        self._take(mask, block)

    def _take(self, mask: Tensor, block: tuple[int, int] | None = None) -> None:
        make_compact(self, "weight", mask, "weight_mask", block)
        self.register_load_state_dict_pre_hook(take_mask)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, mask: Tensor, block: tuple[int, int] | None = None
    ) -> SparseLinear:
        """The same layer with only the connections of `mask`; the bias parameter is shared, not copied.

        Args:
            linear: the dense layer; left as it is.
            mask: bool, the shape of its weight.
            block: as the class takes it.

        Raises:
            RarefyError: the mask has another shape than the weight.

        Example:
            >>> linear = nn.Linear(3, 2)
            >>> sparse = SparseLinear.from_linear(linear, torch.eye(2, 3, dtype=torch.bool))
            >>> torch.equal(sparse.weight, linear.weight * torch.eye(2, 3))
            True
        """
        weight: Any = linear.weight
        layer = cls.__new__(cls)
        # Without the constructor, which draws random weights: the run's random numbers stay as they were.
        nn.Module.__init__(layer)
        layer.in_features = linear.in_features
        layer.out_features = linear.out_features
        layer.register_parameter("weight", nn.Parameter(weight.detach().clone(), weight.requires_grad))
        layer.bias = linear.bias
        layer._take(mask, block)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """A plain dense layer with exact zeros at inactive connections; the bias parameter is shared, not copied.

        Example:
            >>> type(SparseLinear(torch.ones(2, 2, dtype=torch.bool)).to_linear()).__name__
            'Linear'
        """
        # On the meta device nothing random is drawn, for a weight that is replaced at once.
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(self.weight.dense(), requires_grad=self.weight.requires_grad)
        linear.bias = self.bias
        return linear.train(self.training)

    def set_topology(self, mask: Tensor) -> Tensor:
        """Replaces the active connections. Surviving ones keep their value, new ones start at zero.

        The parameter stays the same object; its gradient is dropped.

        Args:
            mask: bool, the shape of `weight`.

        Returns:
            int64 [new connections]: the old place of each, −1 = new. Give it to `move_entries` with the `entries` of
            every optimizer state.

        Raises:
            RarefyError: the mask has another shape.

        Example:
            >>> layer = SparseLinear(torch.tensor([[True, True, False]]))
            >>> layer.set_topology(torch.tensor([[False, True, True]]))
            tensor([ 1, -1])
        """
        if mask.shape != self.weight.shape:
            raise RarefyError(
                f"mask: shape {tuple(mask.shape)} is not allowed; give the weight's, {tuple(self.weight.shape)}"
            )
        self.weight.grad = None
        topology = self.weight.topology.with_mask(mask.to(self.weight.device))
        return set_topology(self.weight, topology).long()

    def extra_repr(self) -> str:
        """Adds the measured sparsity to what `nn.Linear` shows."""
        density = self.weight.connections / max(1, self.weight.numel())
        return f"{super().extra_repr()}, sparsity={1 - density:.4g}"


def _check(mask: Tensor) -> None:
    if mask.dtype != torch.bool or mask.dim() != 2:
        raise RarefyError(
            f"mask: {mask.dtype} with shape {tuple(mask.shape)} is not allowed; give a bool matrix"
        )


def take_mask(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Hook before `load_state_dict`: takes the topology of the state, so that its weight fits."""
    weight = module.get_parameter("weight")
    mask = state.get(f"{prefix}weight_mask")
    given = state.get(f"{prefix}weight")
    if isinstance(given, SparseWeight):
        state[f"{prefix}weight"] = given.dense()  # the mask alone says which connections are taken
    if isinstance(weight, SparseWeight) and mask is not None and mask.shape == weight.shape:
        wanted = mask.to(weight.device).bool()
        if not torch.equal(wanted, weight.topology.mask()):
            # It belongs to connections that go.
            weight.grad = None
            set_topology(weight, weight.topology.with_mask(wanted))
