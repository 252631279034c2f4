"""Gradients between sparse weights and dense tensors, and the hook through which every gradient of a weight comes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.utils.hooks import RemovableHandle

from rarefy.tensors.stored import Cell, StoredWeight
from rarefy.torch_private import has_transform, is_batched, without_subclass_functions
from rarefy.torch_private.ddp import outside_of_graphs


class Connection:
    """The hook of a trained weight: what arrives dense is gathered, and shown to whoever wants the dense gradient.

    The weight may get another cell, when it is converted; its hooks stay.

    Args:
        cell: of the weight.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.handle: RemovableHandle | None = None
        self._has_arrived = False

    def arrived(self) -> None:
        """Called when a gradient comes, before it is accumulated."""
        self._has_arrived = True

    def accumulated(self) -> bool:
        """Called when it was accumulated: whether it came through the hook."""
        has_arrived = self._has_arrived
        self._has_arrived = False
        return has_arrived


def came_through_its_hook(weight: StoredWeight) -> bool:
    """Whether the gradient that was accumulated last was seen before; asked once for each.

    Below 2.10 torch loses the hooks of a sparse weight that hooks on saved tensors were given, as checkpoints in the
    forward pass give theirs; `weight._backward_hooks.clear()` does the same in any version.
    """
    connection = vars(weight).get("_connection")
    return connection is None or connection.accumulated()


def connect(weight: StoredWeight) -> StoredWeight:
    """Makes a weight a parameter, and its gradients sparse; may be called again."""
    facts = vars(weight)
    facts["_is_param"] = True
    # `register_hook` would come back here by way of `__torch_function__`.
    with without_subclass_functions():
        if "_connection" not in facts and weight.requires_grad and weight.is_leaf:
            connection = Connection(weight._cell)
            facts["_connection"] = connection
            kind = type(weight)
            connection.handle = weight.register_hook(partial(_arrive, connection, kind))
    return weight


# Where a compiled function has the backward pass in it, this is none of what it compiles.
@outside_of_graphs
def _arrive(connection: Connection, kind: type[StoredWeight], gradient: Tensor | None) -> Tensor | None:
    # A function of somebody's own may leave a weight without gradient.
    if gradient is None:
        return None
    connection.arrived()
    # Sparse already, or watched by a transform, which looks into every operation and would not know this one.
    if isinstance(gradient, StoredWeight) or has_transform() or is_batched(gradient):
        return None
    cell = connection.cell
    if cell.collect is not None:
        cell.collect(gradient.detach())
    return ToSparse.apply(gradient, kind(cell))  # pyright: ignore[reportReturnType]


def gradients_by_edges(
    outputs: tuple[Any, ...],
    inputs: tuple[Any, ...],
    *,
    grad_outputs: Any,
    materialize_grads: bool,
    **options: Any,
) -> tuple[Any, ...] | None:
    """What `torch.autograd.grad` gives, with torch functions in force while the graph runs.

    A checkpoint runs its part of the model once more on the way, where `F.linear` has to find the kernels again. So
    sparse weights among the inputs are named by their edges of the graph, which nobody dispatches on.

    Args:
        outputs: as torch hands them to `__torch_function__`.
        inputs: the same.
        grad_outputs: the same.
        materialize_grads: whether an input that the outputs do not depend on has a gradient of zeros.
        **options: the other arguments of torch.

    Returns:
        One gradient an input; None where sparse tensors are more than inputs that want a gradient.
    """
    given = grad_outputs if isinstance(grad_outputs, Sequence) else [grad_outputs]
    stored = [one for one in inputs if isinstance(one, StoredWeight)]
    is_elsewhere = any(isinstance(one, StoredWeight) for one in (*outputs, *given))
    if is_elsewhere or not all(one.requires_grad for one in stored):
        return None
    for one in stored:
        if "_is_param" in vars(one):
            connect(one)
    edges: Any = [get_gradient_edge(one) if isinstance(one, StoredWeight) else one for one in inputs]
    found = torch.autograd.grad(outputs, edges, grad_outputs, **options)
    if not materialize_grads:
        return found
    # torch cannot make zeros in the shape of an edge.
    return tuple(
        torch.zeros_like(one) if gradient is None else gradient
        for one, gradient in zip(inputs, found, strict=True)
    )


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
