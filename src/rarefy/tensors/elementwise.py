"""Element-wise operations: on the values, wherever that is what the dense weight would do at its active connections.

What an operation makes of inactive positions, it is asked itself, with single numbers in the place of sparse tensors.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from rarefy.tensors.stored import Role, StoredWeight, is_tracing
from rarefy.tensors.topology import Topology
from rarefy.tensors.writes import make_room_for, on_topology, written_arguments
from rarefy.torch_private import leaves, mapped, without_modes

_ANNIHILATING = (torch.ops.aten.mul, torch.ops.aten.mul_)
_DIVIDING = (torch.ops.aten.div, torch.ops.aten.div_, torch.ops.aten.addcdiv, torch.ops.aten.addcdiv_)
_ADDING_PRODUCTS = (torch.ops.aten.addcmul, torch.ops.aten.addcmul_)
_SUMS = (torch.ops.aten.add_, torch.ops.aten.sub_)
# What optimizers do to their states, several times a step: to zeros it gives zeros, which need not be asked for.
_OF_STATES = {
    getattr(torch.ops.aten, name) for name in ("mul_", "div_", "lerp_", "addcmul_", "addcdiv_", "sqrt_")
}


def elementwise(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The result by the values alone; NotImplemented where zeros would not stay zero."""
    if any(isinstance(one, StoredWeight) for one in kwargs.values()):
        return NotImplemented
    operands = _Operands(args)
    # One of torch's own sparse layouts has no entries to be gathered.
    if any(one.layout is not torch.strided for one in operands.dense):
        return NotImplemented
    if func._schema.is_mutable:
        return (
            _in_place(func, args, kwargs, operands) if isinstance(args[0], StoredWeight) else NotImplemented
        )
    return _new(func, args, kwargs, operands) if operands.sparse else NotImplemented


class _Operands:
    """The tensors among the arguments of an operation: sparse ones, and those with a number for each position."""

    def __init__(self, args: Any) -> None:
        self.sparse: list[StoredWeight] = []
        self.dense: list[Tensor] = []
        for one in args:
            if isinstance(one, StoredWeight):
                self.sparse.append(one)
            elif isinstance(one, Tensor) and one.dim():
                self.dense.append(one)

    @property
    def has_filled(self) -> bool:
        """Whether a sparse one has another number than zero at inactive positions."""
        return any(one._cell.inactive != 0 for one in self.sparse)

    def has_broadcast(self, target: StoredWeight) -> bool:
        """Whether a sparse one has another shape than `target`."""
        return any(is_broadcast(one, target) for one in self.sparse)


def _in_place(func: Any, args: Any, kwargs: dict[str, Any], operands: _Operands) -> Any:
    target = args[0]
    if operands.has_broadcast(target):
        args = [one.dense() if is_broadcast(one, target) else one for one in args]
        operands = _Operands(args)
    is_known = not _is_of_states(func, args, operands) and knows_inactive(target)
    inactive = _at_inactive(func, args, kwargs, operands) if is_known else 0
    if target.role is Role.FREE and inactive != 0:
        return NotImplemented
    others = [one for one in operands.sparse if not target.topology.equals(one.topology)]
    # a product is zero where the target has no connection, so it needs no room for those of the other factor
    adds = func.overloadpacket._qualified_op_name.startswith("aten::addc")
    if others and (adds or operands.has_filled or not annihilates(func, args)):
        for other in others:
            make_room_for(target, other)
    func(*(at_connections(one, target.topology) for one in args), **kwargs)
    # Of what is dense only the connections reach a companion.
    target._cell.inactive = 0 if inactive is None else inactive
    target._cell.written()
    return target


def _is_of_states(func: Any, args: Any, operands: _Operands) -> bool:
    """Whether a companion stays zero at inactive positions; a dense operand reaches its connections alone."""
    packet = func.overloadpacket
    keeps = packet in _OF_STATES or (packet in _SUMS and isinstance(args[1], StoredWeight))
    return keeps and args[0].role is Role.COMPANION and not operands.has_filled


def _new(func: Any, args: Any, kwargs: dict[str, Any], operands: _Operands) -> Any:
    sparse = operands.sparse
    # What a companion takes part in is a companion too: an optimizer's sum, say.
    first = next((one for one in sparse if one.role is Role.COMPANION), sparse[0])
    if operands.has_broadcast(first) or _is_larger(first, operands.dense):
        return NotImplemented
    topology = _common_topology(first, sparse)
    if topology is None or _at_inactive(func, args, kwargs, operands) != 0:
        return NotImplemented
    # On the values alone, in the order of those connections.
    found = first.like(func(*(at_connections(one, topology) for one in args), **kwargs))
    found._cell.topology = topology
    found.pass_dense_gradients_of(*sparse)
    return found


def _common_topology(first: StoredWeight, sparse: Sequence[StoredWeight]) -> Topology | None:
    """The connections of a result; None where it is dense.

    A companion brings its own to where it is written, so that what is made of it has those of all.
    """
    others = [one for one in sparse if not first.topology.equals(one.topology)]
    if not others:
        return first.topology
    if first.role is not Role.COMPANION or is_tracing() or not all(one.topology.is_real for one in sparse):
        return None
    topology = first.topology
    for one in others:
        if not topology.covers(one.topology):
            topology = topology.united(one.topology.mask())
    return topology


def knows_inactive(target: StoredWeight) -> bool:
    """Whether it counts what an operation in place makes of inactive positions.

    A managed weight stays zero there whatever is computed; what a companion has there no graph that is traced knows.
    """
    is_traced = is_tracing() or not target.topology.is_real
    return target.role is Role.FREE or (target.role is Role.COMPANION and not is_traced)


def _is_larger(first: StoredWeight, dense: Sequence[Tensor]) -> bool:
    """Whether the result has other positions than the weight, as a column times a row has."""
    if not dense:
        return False
    shape = first.topology.shape
    return torch.broadcast_shapes(shape, *(one.shape for one in dense)) != shape


def is_broadcast(operand: Any, target: StoredWeight) -> bool:
    """Whether a sparse operand has another shape than what it is computed with."""
    if not isinstance(operand, StoredWeight) or operand._cell.topology is target._cell.topology:
        return False
    return operand._cell.topology.shape != target._cell.topology.shape


def _at_inactive(func: Any, args: Any, kwargs: dict[str, Any], operands: _Operands) -> Any:
    """What an operation gives at inactive positions: a number; None where a dense operand decides for each."""
    if annihilates(func, args) and not operands.has_filled:
        return 0
    # What a dense operand has at inactive places is not known without looking at all of it.
    if any(one.numel() != 1 for one in operands.dense):
        return None
    numbers = [
        one.reshape(()) if isinstance(one, Tensor) and not isinstance(one, StoredWeight) else one
        for one in args
    ]
    return at_inactive(func, numbers, kwargs)


def at_connections(operand: Any, topology: Topology) -> Any:
    """An operand's values at connections; numbers and tensors without dimension as they are."""
    if isinstance(operand, StoredWeight):
        return on_topology(operand, topology)
    if isinstance(operand, Tensor) and operand.dim():
        return topology.gather(operand.expand(topology.shape))
    return operand


# ---- zeros ----


def annihilates(func: Any, args: Any) -> bool:
    """Whether a zero of the first sparse argument makes the result zero, whatever the other arguments are.

    Where they are infinite or NaN it would not; that is read as the zero of a connection that does not exist.

    Example:
        >>> annihilates(torch.ops.aten.mul.Tensor, (torch.ones(2), torch.ones(2)))
        False
    """
    packet = func.overloadpacket
    if packet in _ANNIHILATING:
        return any(isinstance(one, StoredWeight) for one in args)
    if not args or not isinstance(args[0], StoredWeight):
        return False
    if packet in (torch.ops.aten.addcdiv, torch.ops.aten.addcdiv_):
        return isinstance(args[1], StoredWeight)
    if packet in _ADDING_PRODUCTS:
        return any(isinstance(one, StoredWeight) for one in args[1:3])
    return packet in _DIVIDING


def keeps_zeros(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Whether the operation gives zero wherever every sparse argument is inactive; as `at_inactive`."""
    return at_inactive(func, args, kwargs) == 0


def at_inactive(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """The number that an operation gives where all sparse arguments are inactive; of several the first that is not 0.

    Args:
        func: an element-wise operation, in place or not.
        args: its arguments; dense ones among them have no dimension.
        kwargs: its keyword arguments.
    """
    asked = mapped(_placeholder, list(args))
    words = tuple(sorted(kwargs.items()))
    # The answer depends on the number in a tensor, so it cannot be remembered.
    if any(isinstance(one, Tensor) for one in leaves([asked, kwargs])) or not _is_hashable((asked, words)):
        return _ask(func, asked, kwargs)
    return _remembered(func, _frozen(asked), words)


class _Inactive:
    """Stands for a sparse argument of a dtype, with the number that it has at inactive positions."""

    def __init__(self, dtype: torch.dtype, number: Any) -> None:
        self.dtype = dtype
        self.number = number

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Inactive) and (other.dtype, other.number) == (self.dtype, self.number)

    def __hash__(self) -> int:
        return hash((self.dtype, self.number))


def _placeholder(value: Any) -> Any:
    return _Inactive(value.dtype, value._cell.inactive) if isinstance(value, StoredWeight) else value


def _frozen(value: Any) -> Hashable:
    return tuple(_frozen(one) for one in value) if isinstance(value, list | tuple) else value


def _is_hashable(value: Any) -> bool:
    try:
        hash(_frozen(value))
    except TypeError:
        return False
    return True


# Each question is a call of torch, and optimizers would put the same ones at every step.
@lru_cache(maxsize=1024)
def _remembered(func: Any, args: tuple[Any, ...], words: tuple[tuple[str, Any], ...]) -> Any:
    return _ask(func, args, dict(words))


def _ask(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    with without_modes(), torch.no_grad():  # while a compiler traces, too, the question is put to real zeros
        given = mapped(_single, args)
        answers = func(*given, **mapped(_single, kwargs))
        if func._schema.is_mutable:
            answers = written_arguments(func, given, {})
        numbers = (answer.item() for answer in leaves(answers) if isinstance(answer, Tensor))
        return next((number for number in numbers if number != 0), 0)


def _single(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()  # an operation in place must not change it
    if isinstance(value, _Inactive):
        return torch.full((), value.number, dtype=value.dtype, device="cpu")
    return value
