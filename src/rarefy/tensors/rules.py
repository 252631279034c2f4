"""The operations that have a rule of their own: aliases, copies, reductions, whole writes, communication."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.tensors.stored import Role, StoredWeight, in_mode_of
from rarefy.tensors.writes import write_dense, write_sparse
from rarefy.torch_private import mapped

aten = torch.ops.aten
Rule = Callable[[Any, Any, dict[str, Any]], Any]

# Entry by entry, so that processes with one topology add up what belongs together.
_REDUCED_AS_THEY_ARE = ("c10d::allreduce_", "c10d::broadcast_", "c10d::allreduce_coalesced_")
_OURS = ("aten::", "prims::", "torch_nn::", "rarefy::")

# What an assignment to `.data` is in a compiled function from torch 2.14 on; before, it is `set_`.
_ASSIGNMENT = "shallow_copy_data_"


def alias(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`detach`, `alias`: another tensor of the same cell."""
    weight = args[0]
    with in_mode_of(weight):
        return weight.alias()


def same_shape(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`view` and `expand` to the shape that the weight has."""
    weight = args[0]
    shape = tuple(args[1])
    if not isinstance(weight, StoredWeight):
        return NotImplemented
    fits = shape in (tuple(weight.shape), (-1, weight.shape[1]), (weight.shape[0], -1))
    return weight.alias() if fits else NotImplemented


def copy_of_values(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`clone` and conversions."""
    weight = args[0]
    if func is aten.clone.default:
        copied = weight.like(func(weight._cell.values))
        copied._cell.inactive = weight._cell.inactive
        return copied
    if weight._cell.is_filled:
        return NotImplemented
    device = kwargs.get("device")
    options = {key: value for key, value in kwargs.items() if key not in ("memory_format", "layout")}
    if device is None or torch.device(device) == weight.device:
        return weight.like(func(weight._cell.values, *args[1:], **options))
    if torch.device(device).type == "meta":
        return NotImplemented
    # The indices go along; on one device they are shared.
    moved = weight.like(func(weight._cell.values, *args[1:], **options))
    moved._cell.topology = weight.topology.to(moved._cell.values.device)
    return moved


def companion(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`zeros_like` and its kin: what an optimizer keeps for a weight."""
    weight = args[0]
    device = kwargs.get("device")
    if (device is not None and torch.device(device) != weight.device) or kwargs.get("layout") not in (
        None,
        torch.strided,
    ):
        return NotImplemented
    options = {key: value for key, value in kwargs.items() if key not in ("memory_format", "layout")}
    return weight.companion(func(weight._cell.values, *args[1:], **options))


def filled_companion(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`full_like`: sparse with zeros only."""
    return companion(func, args, kwargs) if not args[1] else NotImplemented


def new_companion(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`new_empty_strided` and `new_zeros` of the weight's shape, as autograd asks for a gradient."""
    weight = args[0]
    shape = tuple(args[1])
    if shape != tuple(weight.shape) or kwargs.get("device") not in (None, weight.device):
        return NotImplemented
    # Strides are left out: no memory of that shape is to be laid out.
    options = {key: value for key, value in kwargs.items() if key == "dtype"}
    make = torch.zeros_like if func is aten.new_zeros.default else torch.empty_like
    return weight.companion(make(weight._cell.values, **options))


def reduced(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Sums over everything: zeros add nothing."""
    if args[0]._cell.is_filled:
        return NotImplemented
    return func(args[0]._cell.values, *args[1:], **kwargs)


def norm(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Norms over everything, but for those in which zeros count."""
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    if len(args) > 2 or "dim" in kwargs or (order is not None and order < 0) or not args[0].connections:
        return NotImplemented
    if args[0]._cell.is_filled:
        return NotImplemented
    return func(args[0]._cell.values, *args[1:], **kwargs)


def copy_into(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`copy_`: a dense tensor into a sparse one, a sparse one into a dense one, or both sparse."""
    target = args[0]
    source = args[1]
    if not isinstance(target, StoredWeight):
        target.copy_(source.dense())
    elif isinstance(source, StoredWeight) and source.shape == target.shape:
        write_sparse(target, source)
    else:
        write_dense(target, _dense(source).expand(target.shape))
    return target


def zero(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`zero_`."""
    args[0]._cell.values.zero_()
    args[0]._cell.inactive = 0
    args[0]._cell.written()
    return args[0]


def fill(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`fill_`: of a companion all positions; of a managed weight the active ones."""
    target, number = args
    cell = target._cell
    is_free = cell.role is Role.FREE
    # One that is computed is not known while a graph is traced.
    if is_free or (isinstance(number, Tensor) and not target.topology.is_real):
        return NotImplemented
    cell.values.fill_(number)
    if cell.role is Role.COMPANION and target.topology.is_real:
        cell.inactive = number.item() if isinstance(number, Tensor) else number
    cell.written()
    return target


def equal(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`equal`: without a dense copy where the topology is the same."""
    one, other = args
    if (
        isinstance(one, StoredWeight)
        and isinstance(other, StoredWeight)
        and one.topology.equals(other.topology)
        and one._cell.inactive == other._cell.inactive == 0
    ):
        return torch.equal(one._cell.values, other._cell.values)
    # No element-wise operation, though torch calls it one.
    return torch.equal(_dense(one), _dense(other))


def reshaped(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """`set_` and `resize_`: a sparse weight keeps its shape.

    What a compiler makes of an assignment to `.data` comes here too: whoever took an alias of the weight before would
    see the numbers that are assigned, where a dense one keeps the old ones.

    Raises:
        RarefyError: always.
    """
    name = func._schema.name.removeprefix("aten::")
    given = "an assignment to .data in a compiled function" if name == _ASSIGNMENT else name
    raise RarefyError(
        f"{given} is not allowed on a sparse weight, whose shape and memory are fixed; write to it with copy_"
    )


def refused(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Operations whose gradients read what only a forward pass by torch's own dispatch leaves.

    Raises:
        RarefyError: always.
    """
    raise RarefyError(
        f"{func._schema.name.removeprefix('aten::')} is not allowed with a sparse weight; give its .dense(), or set "
        "compute: masked"
    )


def foreign(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Operations of other libraries: collectives that keep places apart act on the values, all others are refused.

    Raises:
        RarefyError: the operation may read or write memory that is not there.
    """
    name = func._schema.name
    if name not in _REDUCED_AS_THEY_ARE:
        raise RarefyError(
            f"{name} is not allowed with a sparse weight; give its .dense(), or set compute: masked"
        )
    written = [one for one in args[0] if isinstance(one, StoredWeight)]
    result = func(*mapped(_values, args), **mapped(_values, kwargs))
    for weight in written:
        # Others may have had another number there, or none.
        weight._cell.inactive = 0
        weight._cell.written()
    return result


def is_foreign(func: Any) -> bool:
    """Whether an operation belongs to another library than torch and rarefy."""
    return not func._schema.name.startswith(_OURS)


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, StoredWeight) else value


def _values(value: Any) -> Any:
    return value._cell.values if isinstance(value, StoredWeight) else value


RULES: Mapping[Any, Rule] = {
    **dict.fromkeys((aten.detach.default, aten.alias.default, aten.lift_fresh.default), alias),
    **dict.fromkeys((aten.view.default, aten._unsafe_view.default, aten.expand.default), same_shape),
    **dict.fromkeys((aten.clone.default, aten._to_copy.default), copy_of_values),
    **dict.fromkeys((aten.zeros_like.default, aten.empty_like.default), companion),
    **dict.fromkeys((aten.new_empty_strided.default, aten.new_zeros.default), new_companion),
    aten.full_like.default: filled_companion,
    aten.sum.default: reduced,
    aten.linalg_vector_norm.default: norm,
    aten.norm.Scalar: norm,
    aten.copy_.default: copy_into,
    aten.zero_.default: zero,
    **dict.fromkeys((aten.fill_.Scalar, aten.fill_.Tensor), fill),
    aten.equal.default: equal,
    aten._sparse_mm_reduce_impl.default: refused,
    **dict.fromkeys((aten.set_.source_Tensor, aten.set_.source_Storage, aten.set_.default), reshaped),
    **dict.fromkeys((aten.resize_.default, aten.resize_as_.default), reshaped),
    **({getattr(aten, _ASSIGNMENT).default: reshaped} if hasattr(aten, _ASSIGNMENT) else {}),
}
