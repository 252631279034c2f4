"""Calls into the compiled kernels. Tensors are passed as addresses, so every function here states what it relies on."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TypeAlias

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels.instruction_sets import extension, instruction_set_index, remedy
from rarefy.torch_private import has_mode, has_transform

Structure: TypeAlias = tuple[int, int, int, Tensor, Tensor]
"""Rows, columns, panel width, starts and offsets of a matrix."""

_DTYPES = (torch.float32, torch.bfloat16)
_PLAIN = (Tensor, torch.nn.Parameter)


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
    return all(
        type(tensor) in _PLAIN and not (grads and tensor.requires_grad) and not tensor.is_neg()
        for tensor in tensors
    )


def build(
    mask: Tensor, width: int, transposed_width: int, active: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five index tensors of `CSR`, from a contiguous bool mask on the CPU."""
    module, threads = _module(), torch.get_num_threads()
    rows, columns = mask.shape
    starts, offsets = _empty_structure(rows, columns, width, active)
    back_starts, back_offsets = _empty_structure(columns, rows, transposed_width, active)
    order = torch.empty(active, dtype=torch.int32)
    shape = (rows, columns, width, starts.data_ptr())
    module.panels_count(mask.data_ptr(), *shape, threads)
    module.panels_fill(mask.data_ptr(), *shape, offsets.data_ptr(), threads)
    back = (back_starts.data_ptr(), back_offsets.data_ptr(), order.data_ptr())
    module.panels_transpose(*shape, offsets.data_ptr(), transposed_width, *back, threads)
    return starts, offsets, back_starts, back_offsets, order


def positions(rows: int, columns: int, width: int, starts: Tensor, offsets: Tensor) -> Tensor:
    """int64 [connections]: row-major position of each connection."""
    found = torch.empty(offsets.numel(), dtype=torch.int64)
    addresses = (starts.data_ptr(), offsets.data_ptr(), found.data_ptr())
    _module().panels_positions(rows, columns, width, *addresses, torch.get_num_threads())
    return found


def sources(
    rows: int, columns: int, structure: tuple[int, Tensor, Tensor], previous: tuple[int, Tensor, Tensor]
) -> Tensor:
    """int64 [connections]: place in `previous` of each connection, −1 = none; both are (width, starts, offsets)."""
    found = torch.empty(structure[2].numel(), dtype=torch.int64)
    pairs = [
        (width, starts.data_ptr(), offsets.data_ptr()) for width, starts, offsets in (structure, previous)
    ]
    threads = torch.get_num_threads()
    _module().panels_sources(rows, columns, *pairs[0], *pairs[1], found.data_ptr(), threads)
    return found


def scatter(rows: int, columns: int, width: int, starts: Tensor, offsets: Tensor, values: Tensor) -> Tensor:
    """The matrix [rows, columns] of contiguous values with elements of 1 or 4 bytes."""
    matrix = values.new_empty(rows, columns)
    addresses = (starts.data_ptr(), offsets.data_ptr(), values.data_ptr(), matrix.data_ptr())
    sizes = (values.element_size(), torch.get_num_threads())
    _module().panels_scatter(rows, columns, width, *addresses, *sizes)
    return matrix


def gather(rows: int, columns: int, width: int, starts: Tensor, offsets: Tensor, matrix: Tensor) -> Tensor:
    """The values of a contiguous matrix with elements of 4 bytes."""
    values = matrix.new_empty(offsets.numel())
    addresses = (starts.data_ptr(), offsets.data_ptr(), matrix.data_ptr(), values.data_ptr())
    _module().panels_gather(rows, columns, width, *addresses, torch.get_num_threads())
    return values


def forward(index: int, x: Tensor, values: Tensor, bias: Tensor | None, structure: Structure) -> Tensor:
    """X · Wᵀ + bias for contiguous x [..., columns]; values and bias float32, contiguous; `index` from `index_for`."""
    rows, columns, width, starts, offsets = structure
    tokens = x.shape[:-1]
    y = x.new_empty(*tokens, rows)
    bias_address = 0 if bias is None else bias.data_ptr()
    _module().forward(
        index, tokens.numel(), rows, columns, width, starts.data_ptr(), offsets.data_ptr(), values.data_ptr(),
        x.data_ptr(), bias_address, y.data_ptr(), _DTYPES.index(x.dtype), torch.get_num_threads(),
    )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    transpose: tuple[Tensor, Tensor, Tensor],
    sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, values and bias (empty where not needed), for contiguous grad and x of one dtype."""
    rows, columns, _, width = sizes
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_values = torch.empty_like(values) if needs[1] else values.new_empty(0)
    grad_bias = values.new_empty(rows if needs[2] else 0)
    outputs = [
        t.data_ptr() if needed else 0
        for t, needed in zip((grad_x, grad_values, grad_bias), needs, strict=True)
    ]
    structure = (columns, rows, width, *(t.data_ptr() for t in transpose))
    _module().backward(
        _index(), x.shape[0], *structure, values.data_ptr(), x.data_ptr(), grad.data_ptr(), *outputs,
        _DTYPES.index(x.dtype), torch.get_num_threads(),
    )  # fmt: skip
    return grad_x, grad_values, grad_bias


def keep_top(scores: Tensor, count: int, candidates: Tensor | None) -> Tensor:
    """The mask of the `count` highest scores, contiguous float32."""
    mask = torch.empty(scores.shape, dtype=torch.bool)
    allowed = 0 if candidates is None else candidates.data_ptr()
    addresses = (scores.data_ptr(), allowed, scores.numel(), count, mask.data_ptr())
    _module().keep_top(_index(), *addresses, torch.get_num_threads())
    return mask


def keep_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    """The mask of the `n` highest of every `m` neighbours, contiguous float32."""
    mask = torch.empty(scores.shape, dtype=torch.bool)
    groups = scores.numel() // m
    _module().keep_n_of_m(_index(), scores.data_ptr(), groups, n, m, mask.data_ptr(), torch.get_num_threads())
    return mask


def block_sums(scores: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Sums over blocks of a contiguous float32 matrix."""
    rows, columns = scores.shape
    sums = torch.empty(rows // block_rows, columns // block_columns)
    shape = (rows, columns, block_rows, block_columns)
    _module().block_sums(_index(), scores.data_ptr(), *shape, sums.data_ptr(), torch.get_num_threads())
    return sums


def select_(data: Tensor, mask: Tensor) -> None:
    """Zeroes what the mask excludes, in place; both contiguous, elements of 2, 4 or 8 bytes."""
    size = (data.numel(), data.element_size())
    _module().select(_index(), data.data_ptr(), mask.data_ptr(), *size, torch.get_num_threads())


def _module() -> ModuleType:
    module = extension()
    if module is None:
        raise RarefyError(f"the compiled kernels are not installed; {remedy(sys.platform)}")
    return module


def _index() -> int:
    index = instruction_set_index()
    return 0 if index is None else index


def _empty_structure(rows: int, columns: int, width: int, active: int) -> tuple[Tensor, Tensor]:
    panels = max(1, -(-columns // width))
    return torch.empty(panels * rows + 1, dtype=torch.int32), torch.empty(active, dtype=torch.int16)
