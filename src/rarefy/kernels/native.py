"""Calls into the compiled kernels. Tensors are passed as addresses, so every function here states what it relies on.

Every argument is passed by its name: the extension refuses a name that it does not know, while two addresses swapped in
a row of integers would corrupt memory.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels.instruction_sets import extension, instruction_set_index, remedy
from rarefy.torch_private import has_memory, has_mode, has_transform

# In the order in which the extension numbers them.
_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


class Layout(NamedTuple):
    """Where the connections of one matrix are: what the kernels read beside the values.

    Args:
        rows, columns: shape of the matrix.
        width: columns a panel.
        starts: int32 [panels · rows + 1], first connection of each row in each panel.
        offsets: int16 [connections], the bits of an unsigned column number within its panel.
    """

    rows: int
    columns: int
    width: int
    starts: Tensor
    offsets: Tensor


def serves(*tensors: Tensor) -> bool:
    """Whether the compiled kernels are in use and take these activations: float32 or bfloat16 on the CPU.

    Example:
        >>> serves(torch.zeros(1, dtype=torch.float64))
        False
    """
    return index_for(*tensors) is not None


def index_for(*tensors: Tensor) -> int | None:
    """The number of the instruction set that takes these activations; None where `serves` is False.

    Example:
        >>> index_for(torch.zeros(1, dtype=torch.float64)) is None
        True
    """
    for tensor in tensors:
        if not tensor.is_cpu or tensor.dtype not in _DTYPES:
            return None
    return instruction_set_index()


def unwatched(*tensors: Tensor) -> bool:
    """Whether these tensors may go to a kernel without the dispatcher: no gradient, tracing, transform or subclass.

    Example:
        >>> unwatched(torch.ones(1)), unwatched(torch.ones(1, requires_grad=True))
        (True, False)
    """
    if has_mode() or has_transform() or torch.jit.is_tracing():
        return False
    grads = torch.is_grad_enabled()
    # The memory of a view that is negated lazily, as `z.conj().imag` is, has the other sign.
    return all(
        type(tensor) in _PLAIN
        and not (grads and tensor.requires_grad)
        and not tensor.is_neg()
        and has_memory(tensor)
        for tensor in tensors
    )


def fits(grad: Tensor, x: Tensor, rows: int, columns: int) -> bool:
    """Whether these are gradients of rows and inputs of columns for the same tokens, as the kernels read them unasked.

    Example:
        >>> fits(torch.ones(5, 3), torch.ones(5, 2), 3, 2), fits(torch.ones(4, 3), torch.ones(5, 2), 3, 2)
        (True, False)
    """
    batch = x.shape[:-1]
    return x.shape == (*batch, columns) and grad.shape == (*batch, rows)


def build(
    mask: Tensor, width: int, transposed_width: int, active: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five index tensors of `Panels`, from a contiguous bool mask on the CPU."""
    module = _module()
    threads = torch.get_num_threads()
    rows, columns = mask.shape
    panels = _empty_layout(rows, columns, width, active)
    module.panels_from_mask(
        mask=mask.data_ptr(),
        rows=rows,
        columns=columns,
        width=width,
        starts=panels.starts.data_ptr(),
        offsets=panels.offsets.data_ptr(),
        connections=active,
        threads=threads,
    )
    transpose = _empty_layout(columns, rows, transposed_width, active)
    # Here and below: `torch.set_default_device` would put it elsewhere, and the kernel writes to its address.
    order = torch.empty(active, dtype=torch.int32, device="cpu")
    module.panels_transpose(
        panels=described(module, panels),
        width=transposed_width,
        starts=transpose.starts.data_ptr(),
        offsets=transpose.offsets.data_ptr(),
        order=order.data_ptr(),
        threads=threads,
    )
    return panels.starts, panels.offsets, transpose.starts, transpose.offsets, order


def positions(panels: Layout) -> Tensor:
    """int64 [connections]: row-major position of each connection."""
    found = torch.empty(panels.offsets.numel(), dtype=torch.int64, device="cpu")
    threads = torch.get_num_threads()
    module = _module()
    module.panels_positions(panels=described(module, panels), positions=found.data_ptr(), threads=threads)
    return found


def sources(panels: Layout, previous: Layout) -> Tensor:
    """int32 [connections]: place in `previous`, of a matrix of the same shape, of each connection; −1 = none."""
    found = torch.empty(panels.offsets.numel(), dtype=torch.int32, device="cpu")
    module = _module()
    module.panels_sources(
        panels=described(module, panels),
        previous=described(module, previous),
        places=found.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return found


def move(entries: Tensor, sources: Tensor) -> Tensor:
    """Contiguous entries of 4 bytes at their new places; zero where `sources`, int32, is −1."""
    if not entries.numel():
        return entries.new_zeros(sources.numel())
    moved = entries.new_empty(sources.numel())
    _module().panels_move(
        entries=entries.data_ptr(),
        places=sources.data_ptr(),
        moved=moved.data_ptr(),
        size=sources.numel(),
        threads=torch.get_num_threads(),
    )
    return moved


def scatter(panels: Layout, values: Tensor) -> Tensor:
    """The matrix [rows, columns] of contiguous values with elements of 1 or 4 bytes."""
    matrix = values.new_empty(panels.rows, panels.columns)
    module = _module()
    module.panels_scatter(
        panels=described(module, panels),
        values=values.data_ptr(),
        matrix=matrix.data_ptr(),
        element_bytes=values.element_size(),
        threads=torch.get_num_threads(),
    )
    return matrix


def gather(panels: Layout, matrix: Tensor) -> Tensor:
    """The values of a contiguous matrix with elements of 1 or 4 bytes."""
    values = matrix.new_empty(panels.offsets.numel())
    module = _module()
    module.panels_gather(
        panels=described(module, panels),
        matrix=matrix.data_ptr(),
        values=values.data_ptr(),
        element_bytes=matrix.element_size(),
        threads=torch.get_num_threads(),
    )
    return values


def forward(index: int, x: Tensor, values: Tensor, bias: Tensor | None, weight: Layout) -> Tensor:
    """X · Wᵀ + bias for contiguous x [..., columns]; values and bias float32, contiguous; `index` from `index_for`."""
    tokens = x.shape[:-1]
    y = x.new_empty(*tokens, weight.rows)
    module = _module()
    module.forward(
        isa=index,
        tokens=tokens.numel(),
        weight=described(module, weight),
        values=values.data_ptr(),
        x=x.data_ptr(),
        # The address 0 says that there is none.
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        element=_DTYPES.index(x.dtype),
        threads=torch.get_num_threads(),
    )
    return y


def backward(
    grad: Tensor, x: Tensor, values: Tensor, transposed: Layout, order: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, values and bias (else empty), for contiguous grad and x [..., columns] of one dtype."""
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_values = torch.empty_like(values) if needs[1] else values.new_empty(0)
    # The columns of the transpose are the outputs.
    grad_bias = values.new_empty(transposed.columns if needs[2] else 0)
    module = _module()
    module.backward(
        isa=_index(),
        tokens=x.shape[:-1].numel(),
        transposed=described(module, transposed),
        order=order.data_ptr(),
        values=values.data_ptr(),
        x=x.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad_x.data_ptr() if needs[0] else 0,
        grad_values=grad_values.data_ptr() if needs[1] else 0,
        grad_bias=grad_bias.data_ptr() if needs[2] else 0,
        element=_DTYPES.index(x.dtype),
        threads=torch.get_num_threads(),
    )
    return grad_x, grad_values, grad_bias


def keep_top(scores: Tensor, count: int, candidates: Tensor | None) -> tuple[Tensor, bool]:
    """The mask of the `count` highest scores, contiguous float32, and whether it cuts a tie."""
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    cuts_tie = _module().keep_top(
        isa=_index(),
        scores=scores.data_ptr(),
        candidates=0 if candidates is None else candidates.data_ptr(),
        size=scores.numel(),
        count=count,
        mask=mask.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return mask, cuts_tie


def keep_in_groups(scores: Tensor, counts: Tensor, candidates: Tensor | None) -> tuple[Tensor, Tensor]:
    """The mask of the highest scores of each row of a contiguous float32 matrix, and which rows cut a tie.

    `counts` is int32, on the CPU as all of them, and has an entry for each possible number of candidates.
    """
    groups, m = scores.shape
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    contested = torch.empty(groups, dtype=torch.bool, device="cpu")
    _module().keep_in_groups(
        isa=_index(),
        scores=scores.data_ptr(),
        candidates=0 if candidates is None else candidates.data_ptr(),
        counts=counts.data_ptr(),
        groups=groups,
        m=m,
        mask=mask.data_ptr(),
        contested=contested.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return mask, contested


def block_sums(scores: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Sums over blocks of a contiguous float32 matrix."""
    rows, columns = scores.shape
    sums = torch.empty(rows // block_rows, columns // block_columns, device="cpu")
    _module().block_sums(
        isa=_index(),
        scores=scores.data_ptr(),
        rows=rows,
        columns=columns,
        block_rows=block_rows,
        block_columns=block_columns,
        sums=sums.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return sums


def fill_inactive_(tensor: Tensor, mask: Tensor, bits: int = 0) -> None:
    """Puts an element's bits where the mask excludes it, in place; both contiguous, elements of 2, 4 or 8 bytes."""
    _module().select(
        isa=_index(),
        data=tensor.data_ptr(),
        mask=mask.data_ptr(),
        fill=bits,
        size=tensor.numel(),
        element_bytes=tensor.element_size(),
        threads=torch.get_num_threads(),
    )


def holds_zeros(data: Tensor, mask: Tensor) -> bool:
    """Whether data has only zeros where the mask has none; both contiguous, elements of 2, 4 or 8 bytes."""
    return _module().holds_zeros(
        isa=_index(),
        data=data.data_ptr(),
        mask=mask.data_ptr(),
        size=data.numel(),
        element_bytes=data.element_size(),
        threads=torch.get_num_threads(),
    )


def has(operation: str) -> bool:
    """Whether the compiled kernels are in use and have an operation; one built before it existed has not.

    Example:
        >>> has("no such operation")
        False
    """
    return instruction_set_index() is not None and hasattr(extension(), operation)


def _module() -> ModuleType:
    module = extension()
    if module is None:
        raise RarefyError(f"the compiled kernels are not installed; {remedy(sys.platform)}")
    return module


def described(module: ModuleType, layout: Layout) -> Any:
    """The layout as the extension takes it. It holds addresses, so it must not outlive the call that it is made for."""
    return module.Layout(
        rows=layout.rows,
        columns=layout.columns,
        width=layout.width,
        starts=layout.starts.data_ptr(),
        offsets=layout.offsets.data_ptr(),
        connections=layout.offsets.numel(),
    )


def _index() -> int:
    index = instruction_set_index()
    return 0 if index is None else index


def _empty_layout(rows: int, columns: int, width: int, active: int) -> Layout:
    # A matrix without columns has one panel as well, so that there is a `starts` to read.
    panels = max(1, -(-columns // width))
    starts = torch.empty(panels * rows + 1, dtype=torch.int32, device="cpu")
    return Layout(rows, columns, width, starts, torch.empty(active, dtype=torch.int16, device="cpu"))
