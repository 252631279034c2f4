"""What a write from outside may do to the connections of a sparse weight: the policy of each role."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.tensors.cell import Role
from rarefy.tensors.stored import StoredWeight, is_tracing
from rarefy.tensors.topology import Topology


def write_dense(target: StoredWeight, dense: Tensor) -> None:
    """Makes a weight what a dense tensor says.

    Args:
        target: a free one gets the connections that it takes; any other keeps its own, all else stays zero.
        dense: the shape of `target`.

    Raises:
        RarefyError: the shape is another, or a free weight is written to in a compiled function.
    """
    cell = target._cell
    if dense.shape != target.shape:
        raise RarefyError(
            f"shape {tuple(dense.shape)} is not allowed in a write to a sparse weight; give {tuple(target.shape)}"
        )
    if cell.role is Role.FREE:
        _make_room(target, dense)
    cell.values.copy_(cell.topology.gather(dense))
    cell.written()


def _make_room(target: StoredWeight, dense: Tensor) -> None:
    if is_tracing() or not target.topology.is_real:
        raise RarefyError(
            "a dense write to a sparse weight that no algorithm manages is not allowed in a compiled function; write "
            "before it is called"
        )
    nonzero = dense != 0
    if bool((nonzero > target.topology.mask()).any()):
        target._cell.move_to(target.topology.united(nonzero))


def write_sparse(target: StoredWeight, source: StoredWeight) -> None:
    """Makes a weight what another sparse one is, its topology too unless an algorithm decides on that.

    Raises:
        RarefyError: the weight is managed, and the other has connections that it has not.
    """
    cell = target._cell
    if not cell.topology.equals(source.topology):
        if cell.role is Role.MANAGED:
            refuse_foreign(target, source)
            cell.values.copy_(cell.topology.gather(source.dense()))
            cell.written()
            return
        cell.values = cell.values.new_empty(source.connections)
        cell.topology = source.topology
    cell.values.copy_(source._cell.values)
    cell.written()


def make_room_for(target: StoredWeight, other: StoredWeight) -> None:
    """Lets the connections of another sparse tensor in, before something is computed in place with both.

    Raises:
        RarefyError: the weight is managed, and the other has connections that it has not.
    """
    if target.role is Role.MANAGED:
        refuse_foreign(target, other)
    elif not target.topology.covers(other.topology):
        target._cell.move_to(target.topology.united(other.topology.mask()))


def refuse_foreign(target: StoredWeight, source: StoredWeight) -> None:
    """Refuses a tensor with connections that a managed weight has not.

    Raises:
        RarefyError: it has some.
    """
    if not target.topology.covers(source.topology):
        new = int((source.topology.sources_in(target.topology) < 0).sum())
        raise RarefyError(
            f"a sparse tensor with {new} other connections is not allowed in a write to a weight whose topology an "
            "algorithm or a layer manages; give its .dense(), of which the active connections are taken, change the "
            "mask first (load_state_dict does both), or let a copy or an average of the model have the same "
            "connections: sparsity.track(copy)"
        )


def on_topology(operand: StoredWeight, topology: Topology) -> Tensor:
    """The values of an operand at the connections of `topology`."""
    if topology.equals(operand.topology):
        return operand._cell.values
    return topology.gather(operand.dense())


@torch.no_grad()
def set_topology(weight: StoredWeight, topology: Topology) -> Tensor:
    """Gives a weight, and all its aliases, other connections; those that stay keep their value, new ones are zero.

    A backward pass through a graph from before is refused.

    Returns:
        int64 [new connections]: the old place of each, −1 = new; for `move_entries`.
    """
    sources = topology.sources_in(weight.topology)
    weight._cell.move_to(topology)
    torch.autograd.graph.increment_version(weight)
    return sources
