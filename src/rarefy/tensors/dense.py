"""The rule for all that has no rule: computed with dense copies, and what was written to them is taken over."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rarefy.tensors.stored import StoredWeight
from rarefy.tensors.writes import RearrangedWeight, is_view_op, view_of, write_dense, written_arguments
from rarefy.torch_private import has_mode, leaves, mapped


class DenseCopies:
    """The dense copy of each sparse argument of one call, made once."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []

    def of(self, value: Any) -> Any:
        """The copy of a sparse weight or a view; anything else as it is."""
        if not isinstance(value, StoredWeight | RearrangedWeight):
            return value
        # By identity: `==` of tensors compares their entries.
        for original, copied in self._pairs:
            if original is value:
                return copied
        copied = value.dense()
        self._pairs.append((value, copied))
        return copied

    def original(self, value: Any) -> Any:
        """The reverse of `of`."""
        for original, copied in self._pairs:
            if copied is value:
                return original
        return value


def computed_densely(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Calls an operation with dense copies in place of sparse weights.

    What it wrote to a copy, by its schema, is taken over by the weight, which is returned in the place of the copy.
    """
    copies = DenseCopies()
    result = func(*mapped(copies.of, args), **mapped(copies.of, kwargs))
    if not func._schema.is_mutable:
        return result
    for target in leaves(written_arguments(func, args, kwargs)):
        take_over(target, copies.of(target))
    return mapped(copies.original, result)


def take_over(target: Any, dense: Tensor) -> None:
    """Writes a dense result into a sparse weight or a view."""
    if isinstance(target, StoredWeight):
        write_dense(target, dense)
    elif isinstance(target, RearrangedWeight):
        target.write(lambda shown: shown.copy_(dense))


def viewed_or_dense(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """A view where the operation makes one of a weight; else computed densely."""
    if is_view_op(func) and isinstance(args[0], StoredWeight) and not has_mode():
        return view_of(args[0], [(func, args[1:], kwargs)])
    return computed_densely(func, args, kwargs)
