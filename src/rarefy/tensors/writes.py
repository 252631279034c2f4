"""What a write from outside may do to the connections of a sparse weight, and views that write through to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.tensors.stored import Role, StoredWeight, as_array, in_mode_of, is_tracing
from rarefy.tensors.topology import Topology
from rarefy.torch_private import make_wrapper, mapped, no_subclass_functions

Step = tuple[Callable[..., Any], Sequence[Any], dict[str, Any]]


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
    cell.inactive = _number_at_inactive(target, dense) if cell.role is Role.COMPANION else 0
    cell.written()


def _number_at_inactive(target: StoredWeight, dense: Tensor) -> Any:
    """The number that a dense tensor has at all inactive positions; 0 where there are several, or a graph is traced."""
    if is_tracing() or not target.topology.is_real:
        return 0
    rest = dense[~target.topology.mask()]
    is_one = rest.numel() > 0 and bool((rest == rest[0]).all())
    return rest[0].item() if is_one else 0


def _make_room(target: StoredWeight, dense: Tensor) -> None:
    # Which connections would be new depends on numbers, and a graph that is being traced has none.
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
    if source._cell.is_filled and cell.role is Role.FREE:
        write_dense(target, source.dense())
        return
    if cell.role is Role.COMPANION:
        cell.inactive = source._cell.inactive
    if not cell.topology.equals(source.topology):
        if cell.role is Role.MANAGED:
            refuse_foreign(target, source)
            cell.values.copy_(cell.topology.gather(source.dense()))
            cell.written()
            return
        # All aliases share the cell, so they follow.
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
    """The values of an operand at the connections of `topology`, to whose shape it is broadcast."""
    if topology.equals(operand.topology):
        return operand._cell.values
    return topology.gather(operand.dense().expand(topology.shape))


@torch.no_grad()
def set_topology(weight: StoredWeight, topology: Topology) -> Tensor:
    """Gives a weight, and all its aliases, other connections; those that stay keep their value, new ones are zero.

    A backward pass through a graph from before is refused.

    Returns:
        int32 [new connections]: the old place of each, −1 = new; for `move_entries`.
    """
    sources = weight._cell.move_to(topology)
    # Graphs from before have saved the weight: autograd compares versions, and refuses them.
    torch.autograd.graph.increment_version(weight)
    return sources


class RearrangedWeight(Tensor):
    """A transposed, sliced or otherwise rearranged sparse weight.

    Args:
        base: the weight, or an alias of it.
        steps: the view operations that lead from the dense weight to this view, each with its other arguments.
    """

    _weight: StoredWeight
    _steps: list[Step]
    __torch_function__ = no_subclass_functions

    @staticmethod
    def __new__(
        cls: type[RearrangedWeight], base: StoredWeight, steps: list[Step], shown: Tensor
    ) -> RearrangedWeight:
        """A wrapper of the shape and strides that the view of a dense weight would have."""
        layout = {"strides": shown.stride(), "storage_offset": shown.storage_offset()}
        return make_wrapper(cls, shown.shape, dtype=shown.dtype, device=shown.device, **layout)

    def __init__(self, base: StoredWeight, steps: list[Step], shown: Tensor) -> None:
        # An alias: it follows a new topology, as the view of a dense weight follows its writes.
        self._weight = base.alias()
        self._steps = steps

    def dense(self) -> Tensor:
        """What it shows just now."""
        return replayed(self._weight.dense(), self._steps)

    def write(self, change: Callable[[Tensor], Any]) -> None:
        """Changes what it shows, and the weight with it.

        Args:
            change: given the dense tensor that it shows, to be changed in place.
        """
        # The whole weight, of which the view is cut once more: positions of a view are not those of connections.
        whole = self._weight.dense()
        change(replayed(whole, self._steps))
        write_dense(self._weight, whole)

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"RearrangedWeight({self.dense()!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().contiguous().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().clone()

    def data_ptr(self) -> int:
        """Of what it shows in the weight's snapshot."""
        return replayed(self._weight._cell.snapshot(), self._steps).data_ptr()

    def untyped_storage(self) -> Any:
        """That of the weight's snapshot."""
        return self._weight._cell.snapshot().untyped_storage()

    def numpy(self, **options: Any) -> Any:
        """A copy of what it shows, which is read-only."""
        return as_array(self.dense(), options)

    def tolist(self) -> Any:
        """What it shows, as nested lists."""
        return self.dense().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        view = args[0] if args else None
        if isinstance(view, RearrangedWeight):
            if func is torch.ops.aten.detach.default:
                with in_mode_of(view):
                    return RearrangedWeight(view._weight, view._steps, view)
            if is_view_op(func):
                return view_of(view._weight, [*view._steps, (func, args[1:], kwargs)])
        if func._schema.is_mutable:
            return written_through(func, args, kwargs)
        return func(*mapped(_shown, args), **mapped(_shown, kwargs))


def _shown(value: Any) -> Any:
    return value.dense() if isinstance(value, RearrangedWeight) else value


def replayed(dense: Any, steps: Sequence[Step]) -> Any:
    """The view that these steps make of a dense tensor."""
    for func, args, kwargs in steps:
        dense = func(dense, *args, **kwargs)
    return dense


def view_of(base: StoredWeight, steps: list[Step]) -> Any:
    """The view, or the list of views, that these steps lead to."""
    shown = replayed(base.dense(), steps)
    if isinstance(shown, Tensor):
        with in_mode_of(base):
            return RearrangedWeight(base, steps, shown)
    # One of several views is replayed by making all of them once more and taking its own.
    return [view_of(base, [*steps, (itemgetter(place), (), {})]) for place in range(len(shown))]


def is_view_op(func: Any) -> bool:
    """Whether an operation returns a view of its first argument."""
    returns = func._schema.returns
    alias = returns[0].alias_info if returns else None
    return alias is not None and not alias.is_write


def written_arguments(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Any]:
    """The arguments that the schema of an operation says it writes to; lists as they are."""
    arguments = func._schema.arguments
    positional = [given for spec, given in zip(arguments, args, strict=False) if _is_written(spec)]
    return positional + [kwargs[spec.name] for spec in arguments if spec.name in kwargs and _is_written(spec)]


def _is_written(spec: Any) -> bool:
    return spec.alias_info is not None and spec.alias_info.is_write


def written_through(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls an operation that writes with dense tensors in place of views; their weights take what it wrote."""
    views = [
        one
        for given in written_arguments(func, args, kwargs)
        for one in _listed(given)
        if isinstance(one, RearrangedWeight)
    ]
    if len(views) != 1 or views[0] is not args[0]:
        return _written_apart(func, args, kwargs, views)
    view = views[0]
    rest = mapped(_shown, args[1:])
    view.write(lambda shown: func(shown, *rest, **mapped(_shown, kwargs)))
    return view


def _written_apart(func: Any, args: Any, kwargs: dict[str, Any], views: list[RearrangedWeight]) -> Any:
    """The same with several views, or one that is not the first argument: each is copied, then written back."""
    copies = [(view, view.dense().clone()) for view in views]

    def replaced(value: Any) -> Any:
        found = [copied for view, copied in copies if view is value]
        return found[0] if found else _shown(value)

    def returned(value: Any) -> Any:
        found = [view for view, copied in copies if copied is value]
        return found[0] if found else value

    result = func(*mapped(replaced, args), **mapped(replaced, kwargs))
    for view, copied in copies:
        view.write(lambda shown, copied=copied: shown.copy_(copied))
    return mapped(returned, result)


def _listed(given: Any) -> Sequence[Any]:
    return given if isinstance(given, list | tuple) else [given]
