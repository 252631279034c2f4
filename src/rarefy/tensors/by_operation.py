"""Which rule computes an operation on a sparse weight: its own, the element-wise one, or a dense copy."""

from __future__ import annotations

from typing import Any

import torch

from rarefy.tensors.dense import viewed_or_dense
from rarefy.tensors.elementwise import elementwise
from rarefy.tensors.lists import listwise, takes_lists
from rarefy.tensors.operation import KERNEL_RULES
from rarefy.tensors.rules import RULES, foreign, is_foreign
from rarefy.tensors.views import WeightView, written_through
from rarefy.torch_private import leaves, mapped

_ELEMENTWISE = torch.Tag.pointwise
_RANDOM = torch.Tag.nondeterministic_seeded


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes an operation that has a sparse weight among its arguments."""
    rule = RULES.get(func) or KERNEL_RULES.get(func)
    if rule is not None:
        result = rule(func, args, kwargs)
        if result is not NotImplemented:
            return result
    if is_foreign(func):
        return foreign(func, args, kwargs)
    if any(isinstance(one, WeightView) for one in leaves([args, kwargs])):
        if func._schema.is_mutable:
            return written_through(func, args, kwargs)
        return func(*mapped(_shown, args), **mapped(_shown, kwargs))
    return _by_kind(func, args, kwargs)


def _by_kind(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if takes_lists(func._schema.name) and isinstance(args[0], list | tuple):
        return listwise(func, args, kwargs)
    # random numbers are drawn for the whole weight, so that they are those of the dense model
    if _ELEMENTWISE in func.tags and _RANDOM not in func.tags:
        result = elementwise(func, args, kwargs)
        if result is not NotImplemented:
            return result
    return viewed_or_dense(func, args, kwargs)


def _shown(value: Any) -> Any:
    return value.dense() if isinstance(value, WeightView) else value
