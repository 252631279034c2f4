"""`SparseWeight`: a weight that stores its active connections alone, and answers as the dense weight would.

Which rule computes an operation on it: its own, the element-wise one, or a dense copy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor

from rarefy.errors import RarefyError
from rarefy.tensors.dense import viewed_or_dense
from rarefy.tensors.elementwise import elementwise
from rarefy.tensors.gradient import connect, gradients_by_edges
from rarefy.tensors.lists import listwise, takes_lists
from rarefy.tensors.products import KERNEL_RULES, PRODUCTS, linear
from rarefy.tensors.rules import RULES, foreign, is_foreign
from rarefy.tensors.stored import PARTS, Cell, Role, StoredWeight, as_array
from rarefy.tensors.topology import Topology
from rarefy.tensors.writes import RearrangedWeight, written_through
from rarefy.torch_private import (
    READS_VERSION,
    has_mode,
    mapped,
    not_compiled,
    without_subclass_functions,
)
from rarefy.torch_private.replacing import replace_content

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
    if _has_view(args) or _has_view(kwargs.values()):
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


def _has_view(arguments: Iterable[Any]) -> bool:
    """Whether a view of a sparse weight is among the arguments of an operation, or in one of its lists."""
    return any(
        _has_view(one) if isinstance(one, list | tuple) else isinstance(one, RearrangedWeight)
        for one in arguments
    )


def _shown(value: Any) -> Any:
    return value.dense() if isinstance(value, RearrangedWeight) else value


_LINEAR = F.linear
# What is read of a tensor several times a step: facts, through which no gradient comes.
_FACTS = frozenset(
    (
        *(getattr(Tensor, name).__get__ for name in ("grad", "requires_grad", "layout", "is_sparse")),
        READS_VERSION,
        Tensor.is_inference,
    )
)
_CONVERSIONS = frozenset(
    (
        Tensor.to,
        Tensor.double,
        Tensor.float,
        Tensor.half,
        Tensor.bfloat16,
        Tensor.cpu,
        Tensor.cuda,
        Tensor.type,
    )
)
_OWN = ("_cell", "_connection", "_is_param", "_replaces_data")


class SparseWeight(StoredWeight):
    """A weight matrix of which only the active connections are stored and computed with.

    Shape, dtype, place and arithmetic are those of the dense weight with zeros at inactive connections. `F.linear`
    takes the kernels, element-wise operations act on the values, everything else is computed with a dense copy. What is
    written reaches the active connections; in a copy that no algorithm manages, all of them.

    Args:
        cell: values and topology.
        requires_grad: as of any tensor.

    Example:
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> weight = SparseWeight.from_dense(torch.tensor([[1.0, 5.0], [2.0, 3.0]]), mask)
        >>> weight.shape, weight.connections, weight.sum()
        (torch.Size([2, 2]), 3, tensor(6.))
    """

    @classmethod
    def from_dense(
        cls,
        dense: Tensor,
        mask: Tensor,
        role: Role = Role.FREE,
        is_transposed: bool = False,
        block: tuple[int, int] | None = None,
    ) -> SparseWeight:
        """The weight with only the connections of a mask.

        Args:
            dense: a matrix; copied.
            mask: bool, its shape.
            role: who decides on the connections.
            is_transposed: whether it multiplies as [in, out].
            block: outputs and inputs of the blocks in which its masks come, if they do; see `Topology`.

        Raises:
            RarefyError: the mask has another shape, or is no bool matrix.
        """
        if mask.shape != dense.shape:
            raise RarefyError(
                f"mask: shape {tuple(mask.shape)} is not allowed; give the weight's, {tuple(dense.shape)}"
            )
        topology = Topology.from_mask(mask.to(dense.device), is_transposed, block)
        values = topology.gather(dense.detach())
        # Detached once more: compilers have another graph for what is a view of something, as values of blocks are.
        return cls(Cell(values.detach(), topology, role))

    @classmethod
    @not_compiled
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # First, since a lone token spends as long on the way here as in the kernel.
        if func is _LINEAR:
            return linear(*args, **kwargs) if kwargs else linear(*args)
        if func in _FACTS:
            with without_subclass_functions():
                return func(*args)
        if torch.compiler.is_compiling():
            return _while_tracing(func, args, kwargs or {})
        product = PRODUCTS.get(func)
        if product is not None:
            result = product(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        if func is torch.autograd.grad:
            found = gradients_by_edges(*args, **(kwargs or {}))
            if found is not None:
                return found
        # Any operation may be the first through which a gradient comes to the parameter, to be gathered there.
        for one in args:
            if type(one) is cls and "_is_param" in vars(one) and "_connection" not in vars(one):
                connect(one)
        with without_subclass_functions():
            result = func(*args, **(kwargs or {}))
        return _in_place_of(args[0], result) if func in _CONVERSIONS else result

    @classmethod
    @not_compiled
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        kind = "Parameter of " if "_is_param" in vars(self) else ""
        facts = f"shape={tuple(self.shape)}, connections={self.connections}, dtype={self.dtype}"
        return f"{kind}SparseWeight({facts}, requires_grad={self.requires_grad})"

    # ---- the same object with other content ----

    @property
    def data(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        """An alias without gradient, as of any tensor."""
        return self.alias()

    @data.setter
    def data(self, new: Tensor) -> None:
        if new.shape != self.shape:
            raise RarefyError(
                f".data: shape {tuple(new.shape)} is not allowed; a sparse weight keeps its shape {tuple(self.shape)}"
            )
        if isinstance(new, StoredWeight) and new._cell is self._cell:
            return
        if new.dtype == self.dtype and new.device == self.device:
            _leave_cell(self)
            with torch.no_grad():
                self.alias().copy_(new)
        else:
            _convert(self, new)

    # ---- copies and files ----

    def __deepcopy__(self, memo: dict[int, Any]) -> SparseWeight:
        copied = SparseWeight(copy.deepcopy(self._cell, memo), self.requires_grad)
        # the gradient of a leaf and the attributes that somebody put on the parameter
        vars(copied).update({k: copy.deepcopy(v, memo) for k, v in vars(self).items() if k not in _OWN})
        if "_is_param" in vars(self):
            connect(copied)
        if self.is_leaf and self.grad is not None:
            copied.grad = copy.deepcopy(self.grad, memo)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Files hold dense tensors."""
        dense = self._cell.dense().detach()
        is_parameter = "_is_param" in vars(self)
        return (nn.Parameter(dense, self.requires_grad) if is_parameter else dense).__reduce_ex__(protocol)

    def share_memory_(self) -> SparseWeight:
        """Moves values and indices to shared memory."""
        for name in PARTS:
            getattr(self, name).share_memory_()
        self.topology.forget_label()
        return _in_place_of(self, self)

    def is_shared(self) -> bool:
        """Whether other processes see what is written."""
        return self.entries.is_shared()

    # ---- for code that reads memory ----

    def data_ptr(self) -> int:
        """The address of a dense snapshot, which holds until the next write or forward pass."""
        return self.untyped_storage().data_ptr()

    def untyped_storage(self) -> Any:
        """The memory of a dense snapshot, which is right until the next write."""
        # A compiler's stand-in has no entries to make a snapshot of; torch 2.6 asks it outside of its mode.
        if has_mode() or torch.compiler.is_compiling() or not self.topology.is_real:
            return super().untyped_storage()
        return self._cell.snapshot().untyped_storage()

    def numpy(self, **options: Any) -> Any:
        """A copy as a dense array, which is read-only."""
        if self.requires_grad:
            return super().numpy(**options)  # torch's own refusal
        return as_array(self.dense(), options)

    def tolist(self) -> Any:
        """Dense, as nested lists."""
        return self.dense().tolist()

    def __dlpack__(self, **_: Any) -> Any:
        raise RarefyError(
            "a sparse weight has no dense memory to be shared through dlpack; give its .dense()"
        )

    def __dlpack_device__(self) -> Any:
        return self.__dlpack__()


def _while_tracing(func: Any, args: Any, kwargs: Any) -> Any:
    if func is torch.addmm or func is torch.matmul or func is Tensor.matmul or func is Tensor.__matmul__:
        result = PRODUCTS[func](*args, **kwargs)
        if result is not NotImplemented:
            return result
    with without_subclass_functions():
        return func(*args, **kwargs)


def _in_place_of(weight: Any, result: Any) -> Any:
    """What a conversion of a parameter gives: a tensor that its module assigns to `.data`; see `_Flatten`."""
    if torch.is_grad_enabled() or type(result) is not SparseWeight or "_is_param" not in vars(weight):
        return result
    given = result.alias() if result is weight else result
    vars(given)["_replaces_data"] = True
    return given


def _leave_cell(weight: SparseWeight) -> None:
    """Gives a weight values of its own: who took its `.data` before keeps what was there, to put it back later."""
    old = weight._cell
    cell = Cell(old.values.detach().clone(), old.topology, old.role)
    cell.collect = old.collect
    weight._cell = cell
    connection = vars(weight).get("_connection")
    if connection is not None:
        connection.cell = cell


def _convert(weight: SparseWeight, new: Tensor) -> None:
    """Another dtype or device; the weight stays the same object, as managed as it was."""
    old = weight._cell
    topology = old.topology if new.device == weight.device else old.topology.to(new.device)
    entries = new._cell.values if isinstance(new, StoredWeight) else topology.gather(new)
    cell = Cell(entries.detach(), topology, old.role)
    # A dense gradient that is asked for is wanted in the new form too.
    cell.collect = old.collect
    become(weight, SparseWeight(cell, weight.requires_grad))


def become(parameter: Tensor, new: Tensor) -> None:
    """Makes a parameter dense or sparse, or gives it another dtype; it stays the same object, with its hooks.

    The gradient follows where it can.

    Args:
        parameter: a leaf.
        new: nobody else needs it.

    Example:
        >>> weight = nn.Parameter(torch.ones(2, 2))
        >>> become(weight, SparseWeight.from_dense(weight, torch.eye(2, dtype=torch.bool)).requires_grad_())
        >>> isinstance(weight, SparseWeight), isinstance(weight, nn.Parameter), weight.sum().item()
        (True, True, 2.0)
    """
    gradient = parameter.grad
    connection = vars(parameter).pop("_connection", None)
    replace_content(parameter, new)
    if isinstance(parameter, StoredWeight):
        # The hook that it has goes on, and reads the new cell.
        if connection is not None:
            connection.cell = parameter._cell
            vars(parameter)["_connection"] = connection
        connect(parameter)
    else:
        for name in _OWN:
            vars(parameter).pop(name, None)
        if connection is not None and connection.handle is not None:
            connection.handle.remove()
    if gradient is not None:
        parameter.grad = _gradient_for(parameter, gradient)


def _gradient_for(parameter: Tensor, gradient: Tensor) -> Tensor:
    if not isinstance(parameter, StoredWeight):
        dense = gradient.dense() if isinstance(gradient, StoredWeight) else gradient
        return dense.to(parameter.dtype).to(parameter.device)
    if isinstance(gradient, StoredWeight):
        return gradient.to(parameter.dtype).to(parameter.device)
    return parameter.companion(parameter.topology.gather(gradient.to(parameter.device)).to(parameter.dtype))


# ---- other processes: memory is shared, the parameter stays sparse ----


def _send(weight: SparseWeight) -> Any:
    # What is received is managed, and has zeros wherever it has no connection.
    if weight._cell.is_filled:
        return reduce_tensor(weight.dense())
    topology = weight.topology
    parts = (topology.facts, topology.parts)
    return _receive, (weight.entries, *parts, weight.requires_grad, "_is_param" in vars(weight))


def _receive(
    entries: Tensor, facts: Any, parts: Any, requires_grad: bool, is_parameter: bool
) -> SparseWeight:
    topology = Topology.of_copies(facts, parts)
    # the memory is that of the weight in the other process, whose topology must stay
    weight = SparseWeight(Cell(entries, topology, Role.MANAGED), requires_grad)
    if is_parameter:
        connect(weight)
    return weight


ForkingPickler.register(SparseWeight, _send)
