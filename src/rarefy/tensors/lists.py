"""Operations on lists, as `foreach` and fused optimizers use them: each place of the lists by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rarefy.tensors.dense import computed_densely
from rarefy.tensors.elementwise import at_connections, at_inactive, is_broadcast, keeps_zeros, knows_inactive
from rarefy.tensors.stored import Role, StoredWeight, is_tracing
from rarefy.tensors.writes import make_room_for, write_dense, written_arguments

_PREFIXES = ("aten::_foreach_", "aten::_fused_", "aten::_amp_foreach")
_OF_OPTIMIZERS = _PREFIXES[1:]
_OF_STATES = ("mul_", "div_", "lerp_", "addcmul_", "addcdiv_", "sqrt_")


def takes_lists(name: str) -> bool:
    """Whether an operation works on lists of tensors.

    Example:
        >>> takes_lists("aten::_foreach_add_"), takes_lists("aten::cat")
        (True, False)
    """
    return name.startswith(_PREFIXES)


def listwise(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls an operation with the values of the sparse weights among its lists."""
    # One by one: `copy_` has a rule of its own, by role and topology.
    if func._schema.name == "aten::_foreach_copy_":
        for target, source in zip(*args[:2], strict=True):
            target.copy_(source)
            _count_write(target)
        return None
    return _in_place(func, args, kwargs) if func._schema.is_mutable else _new(func, args, kwargs)


def _is_list(given: Any, length: int) -> bool:
    return isinstance(given, list | tuple) and len(given) == length and length > 0


def _at(place: int, given: Any, length: int) -> Any:
    """One place of a list, as a list of one; what is no list as it is."""
    return [given[place]] if _is_list(given, length) else given


# ---- in place ----


def _in_place(func: Any, args: Any, kwargs: dict[str, Any]) -> None:
    length = len(args[0])
    lists = [given for given in (*args, *kwargs.values()) if _is_list(given, length)]
    written = [given for given in written_arguments(func, args, kwargs) if _is_list(given, length)]
    places = [
        _Place(
            [given[place] for given in written],
            [given[place] for given in lists],
            partial(_at_inactive, func, [_at(place, given, length) for given in args], kwargs),
        )
        for place in range(length)
    ]

    def unwrapped(given: Any) -> Any:
        if not _is_list(given, length):
            return given
        return [place.of(one) for place, one in zip(places, given, strict=True)]

    # For all places at once: one launch for many tensors is what these operations are for.
    func(*(unwrapped(given) for given in args), **{key: unwrapped(given) for key, given in kwargs.items()})
    for place in places:
        place.finish()


class _Place:
    """One place of the lists of an operation that writes: on the values of the first tensor that is written to.

    Args:
        written: the tensors there that are written to.
        tensors: all of them.
        at_inactive: what the operation gives at inactive positions, None where that is not one number.
    """

    def __init__(self, written: list[Any], tensors: list[Any], at_inactive: Callable[[], Any]) -> None:
        self._written = written
        self._given: list[tuple[Any, Any]] = []
        self._owner: StoredWeight | None = None
        self._inactive: Any = 0
        first = written[0]
        if isinstance(first, StoredWeight):
            is_one_shape = not any(is_broadcast(other, first) for other in tensors)
            inactive = at_inactive() if is_one_shape and knows_inactive(first) else None
            if first.role is not Role.FREE or inactive == 0:
                self._owner = first
                self._inactive = inactive or 0
                self._make_room(tensors)

    def _make_room(self, tensors: Sequence[Any]) -> None:
        assert self._owner is not None
        for other in tensors:
            is_stranger = isinstance(other, StoredWeight) and not self._owner.topology.equals(other.topology)
            if is_stranger and not is_broadcast(other, self._owner):
                make_room_for(self._owner, other)

    def of(self, tensor: Any) -> Any:
        """What the operation gets in place of a tensor, the same for the same one."""
        # By identity, and one copy for each: an operation may read and write one tensor in two of its lists.
        for original, given in self._given:
            if original is tensor:
                return given
        if self._owner is not None:
            given = at_connections(tensor, self._owner.topology)
        else:
            given = tensor.dense() if isinstance(tensor, StoredWeight) else tensor
        self._given.append((tensor, given))
        return given

    def finish(self) -> None:
        """Takes over what was written to copies."""
        for tensor in self._written:
            given = self.of(tensor)
            if isinstance(tensor, StoredWeight) and given is tensor._cell.values:
                if tensor is self._owner:
                    tensor._cell.inactive = self._inactive
                tensor._cell.written()
            elif given is not tensor:
                dense = given if self._owner is None else self._owner.topology.dense(given)
                _take_over(tensor, dense)
            _count_write(tensor)


def _count_write(tensor: Any) -> None:
    """Has autograd notice a write to a weight that a graph needs: of lists torch counts those to dense tensors."""
    if isinstance(tensor, StoredWeight) and not is_tracing() and not tensor.is_inference():
        torch.autograd.graph.increment_version(tensor)


def _take_over(tensor: Tensor, dense: Tensor) -> None:
    if isinstance(tensor, StoredWeight):
        write_dense(tensor, dense)
    else:
        tensor.copy_(dense)


def _at_inactive(func: Any, alone: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation on lists of one gives at inactive positions, None where that is not one number.

    Those of optimizers give zero: their states start so.
    """
    if func._schema.name.startswith(_OF_OPTIMIZERS) or _is_of_states(func, alone):
        return 0
    return at_inactive(func, alone, kwargs) if _is_uniform(alone) else None


def _is_of_states(func: Any, alone: Sequence[Any]) -> bool:
    """Whether zeros are known to stay zero. To ask for it would wait for a factor that is on a GPU."""
    name = func._schema.name.removeprefix("aten::_foreach_")
    is_sum = name in ("add_", "sub_") and _is_list(alone[1], 1)
    tensors = [given[0] for given in alone if _is_list(given, 1)]
    is_filled = any(isinstance(one, StoredWeight) and one._cell.is_filled for one in tensors)
    return (is_sum or name in _OF_STATES) and not is_filled and _is_uniform(alone)


def _is_uniform(alone: Sequence[Any]) -> bool:
    """Whether all tensors of a place are sparse, but for those without dimension."""
    tensors = [given[0] for given in alone if _is_list(given, 1) and isinstance(given[0], Tensor)]
    return all(isinstance(one, StoredWeight) for one in tensors if one.dim())


# ---- new tensors ----


def _new(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    length = len(args[0])
    alone = [[_at(place, given, length) for given in args] for place in range(length)]
    owners = [_owner_of(place) for place in alone]
    if not all(_keeps(func, place, owner, kwargs) for place, owner in zip(alone, owners, strict=True)):
        return computed_densely(func, args, kwargs)

    def unwrapped(given: Any) -> Any:
        if not _is_list(given, length):
            return given
        pairs = zip(given, owners, strict=True)
        return [one if owner is None else at_connections(one, owner.topology) for one, owner in pairs]

    results = func(*(unwrapped(given) for given in args), **kwargs)
    if _is_norm(func):
        return results
    return [one if owner is None else owner.like(one) for one, owner in zip(results, owners, strict=True)]


def _owner_of(alone: Sequence[Any]) -> StoredWeight | None:
    tensors = [given[0] for given in alone if _is_list(given, 1)]
    sparse = [one for one in tensors if isinstance(one, StoredWeight)]
    companions = [one for one in sparse if one.role is Role.COMPANION]
    return next(iter([*companions, *sparse]), None)


def _keeps(func: Any, alone: Any, owner: StoredWeight | None, kwargs: dict[str, Any]) -> bool:
    """Whether the result at one place is known from the values."""
    if owner is None:
        return True
    if _is_norm(func):
        order = alone[1] if len(alone) > 1 else kwargs.get("ord", 2)
        # With a negative order the smallest number counts, which is a zero of the dense weight; of no connections
        # torch knows no highest number.
        return order >= 0 and owner.connections > 0 and not owner._cell.is_filled
    if func._schema.name == "aten::_foreach_max" or not _is_uniform(alone):
        return False
    sparse = [given[0] for given in alone if _is_list(given, 1) and isinstance(given[0], StoredWeight)]
    if not all(owner.topology.equals(one.topology) for one in sparse):
        return False
    # zero divided by zero is a connection that does not exist
    is_quotient = func._schema.name == "aten::_foreach_div" and not any(one._cell.is_filled for one in sparse)
    return is_quotient or keeps_zeros(func, alone, kwargs)


def _is_norm(func: Any) -> bool:
    return func._schema.name == "aten::_foreach_norm"
