"""Calls into the compiled block kernels; `native` says what holds for all such calls."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import native
from rarefy.kernels.instruction_sets import extension, matrix_unit

_DTYPES = (torch.float32, torch.bfloat16)


def serves(sizes: list[int], *tensors: Tensor) -> bool:
    """Whether the compiled kernels take blocks of this size with these activations.

    Args:
        sizes: those of a `BlockTopology`.
        tensors: float32 or bfloat16 on the CPU, if they are to be served.

    Example:
        >>> serves([12, 12, 4, 4], torch.zeros(1))
        False
    """
    _, _, height, width = sizes
    fits = height % 8 == 0 and width % 8 == 0
    return fits and native.serves(*tensors) and hasattr(extension(), "best_matrix_unit")


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, indices: Tensor, sizes: list[int]
) -> Tensor:
    """X · Wᵀ + bias for contiguous x [..., columns]; values and bias float32, contiguous."""
    module: Any = extension()
    tokens = x.shape[:-1]
    y = x.new_empty(*tokens, sizes[0])
    module.blocks_forward(
        isa=native.index_for(x),
        unit=matrix_unit(),
        tokens=tokens.numel(),
        shape=_shape(module, sizes),
        by_row=_lines(module, starts, indices),
        values=values.data_ptr(),
        x=x.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        element=_DTYPES.index(x.dtype),
        threads=torch.get_num_threads(),
    )
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    transpose: tuple[Tensor, Tensor, Tensor],
    sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, values and bias (empty where not needed), for contiguous grad and x of one dtype.

    Args:
        grad: [..., rows].
        x: [..., columns].
        values: float32, contiguous.
        transpose: starts and indices by block column, and the order.
        sizes: those of the `BlockTopology`.
        needs: which of the three are wanted.
    """
    module: Any = extension()
    starts, indices, order = transpose
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_values = torch.empty_like(values) if needs[1] else values.new_empty(0)
    grad_bias = values.new_empty(sizes[0] if needs[2] else 0)
    module.blocks_backward(
        isa=native.index_for(x),
        unit=matrix_unit(),
        tokens=x.shape[:-1].numel(),
        shape=_shape(module, sizes),
        by_column=_lines(module, starts, indices),
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


def _shape(module: ModuleType, sizes: list[int]) -> Any:
    rows, columns, height, width = sizes
    return module.BlockShape(rows=rows, columns=columns, height=height, width=width)


def _lines(module: ModuleType, starts: Tensor, indices: Tensor) -> Any:
    """The lines as the extension takes them. They hold addresses: they must not outlive the call."""
    return module.BlockLines(
        lines=starts.numel() - 1,
        starts=starts.data_ptr(),
        indices=indices.data_ptr(),
        blocks=indices.numel(),
    )
