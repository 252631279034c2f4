"""Gradients between sparse weights and dense tensors, and the hook through which every gradient of a weight comes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rarefy.tensors.cell import Cell
from rarefy.tensors.stored import StoredWeight
from rarefy.torch_private import has_transform, is_batched, without_subclass_functions


class Connection:
    """The hook of a trained weight: what arrives dense is gathered, and shown to whoever wants the dense gradient.

    The weight may get another cell, when it is converted; its hooks stay.

    Args:
        cell: of the weight.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.handle: RemovableHandle | None = None


def connect(weight: StoredWeight) -> StoredWeight:
    """Makes a weight a parameter, and its gradients sparse; may be called again."""
    facts = vars(weight)
    facts["_is_param"] = True
    with without_subclass_functions():
        if "_connection" not in facts and weight.requires_grad and weight.is_leaf:
            connection = Connection(weight._cell)
            facts["_connection"] = connection
            kind = type(weight)
            connection.handle = weight.register_hook(partial(_arrive, connection, kind))
    return weight


def _arrive(connection: Connection, kind: type[StoredWeight], gradient: Tensor) -> Tensor | None:
    if isinstance(gradient, StoredWeight) or has_transform() or is_batched(gradient):
        return None
    cell = connection.cell
    if cell.collect is not None:
        cell.collect(gradient.detach())
    return ToSparse.apply(gradient, kind(cell))  # pyright: ignore[reportReturnType]


class ToSparse(torch.autograd.Function):
    """The entries of a dense tensor at the connections of a weight, as its companion."""

    @staticmethod
    def forward(ctx: Any, dense: Tensor, weight: StoredWeight) -> StoredWeight:
        """Gathers."""
        return weight.companion(weight.topology.gather(dense.to(weight.dtype)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        """Scatters."""
        [gradient] = gradients
        return gradient.dense() if isinstance(gradient, StoredWeight) else gradient, None


class ToDense(torch.autograd.Function):
    """The dense tensor of a sparse weight."""

    @staticmethod
    def forward(ctx: Any, weight: StoredWeight) -> Tensor:
        """Scatters."""
        return weight.dense()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        """Dense; the hook of the weight gathers."""
        return gradients[0]
