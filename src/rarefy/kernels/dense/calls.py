"""Calls into the compiled kernels of this folder, and whether they take a call at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rarefy.kernels import native
from rarefy.kernels.instruction_sets import extension, instruction_set_index
from rarefy.torch_private import has_forward_gradients

_DTYPES = (torch.float32, torch.bfloat16)


def is_traced() -> bool:
    """Whether a graph is being recorded, which keeps the branch that it was made with."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def takes(operation: str, *tensors: Tensor) -> bool:
    """Whether a kernel may read these: contiguous, on the CPU, and nobody watches what is done with them.

    Args:
        operation: its name in the extension.
        tensors: what it reads; whether they want gradients does not matter.

    Example:
        >>> takes("no such operation", torch.ones(1))
        False
    """
    # Asked first: what stands for a tensor while a graph is recorded cannot be compared with a number.
    if is_traced() or not all(type(tensor) in (Tensor, nn.Parameter) for tensor in tensors):
        return False
    if not all(_is_full(tensor) for tensor in tensors) or has_forward_gradients():
        return False
    with torch.no_grad():  # a gradient is what the kernels have themselves
        return native.has(operation) and native.unwatched(*tensors)


def _is_full(tensor: Tensor) -> bool:
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and tensor.is_cpu and tensor.is_contiguous() and tensor.dtype in _DTYPES


def gelu(name: str, x: Tensor, grad: Tensor | None) -> Tensor:
    """`gelu_tanh` or `gelu_exact` of a contiguous tensor, or its gradient where `grad`, as x is, is given."""
    result = torch.empty_like(x)
    getattr(_module(), name)(
        isa=instruction_set_index(),
        x=x.data_ptr(),
        # The address 0 says that there is none.
        grad=0 if grad is None else grad.data_ptr(),
        result=result.data_ptr(),
        size=x.numel(),
        element=_DTYPES.index(x.dtype),
        threads=torch.get_num_threads(),
    )
    return result


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """The norm of rows of float32 as bfloat16, and float32 [rows, 2] for the gradient."""
    y = torch.empty_like(x, dtype=torch.bfloat16)
    rows = x.numel() // x.shape[-1]
    statistics = x.new_empty(rows, 2)
    _module().norm_forward(
        isa=instruction_set_index(),
        x=x.data_ptr(),
        weight=_address(weight),
        bias=_address(bias),
        y=y.data_ptr(),
        statistics=statistics.data_ptr(),
        rows=rows,
        columns=x.shape[-1],
        epsilon=epsilon,
        threads=torch.get_num_threads(),
    )
    return y, statistics


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor, has_bias: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradients of x, of the weight and of the bias, float32; None where there is none of these."""
    columns = x.shape[-1]
    grad_x = torch.empty_like(x)
    grad_weight = None if weight is None else x.new_empty(columns)
    grad_bias = x.new_empty(columns) if has_bias else None
    _module().norm_backward(
        isa=instruction_set_index(),
        x=x.data_ptr(),
        weight=_address(weight),
        statistics=statistics.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_weight=_address(grad_weight),
        grad_bias=_address(grad_bias),
        rows=x.numel() // columns,
        columns=columns,
        threads=torch.get_num_threads(),
    )
    return grad_x, grad_weight, grad_bias


def add_part(stream: Tensor, part: Tensor) -> Tensor:
    """float32 + bfloat16 of one shape, both contiguous."""
    total = torch.empty_like(stream)
    _module().add_part(
        isa=instruction_set_index(),
        stream=stream.data_ptr(),
        part=part.data_ptr(),
        sum=total.data_ptr(),
        size=stream.numel(),
        threads=torch.get_num_threads(),
    )
    return total


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _module() -> Any:
    return extension()
