"""Calls into the compiled kernels whose tiles are float16. What they do not take, those with float32 tiles do.

Tensors are passed as addresses, so every function here states what it relies on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.kernels import native
from rarefy.kernels.instruction_sets import extension, takes_half
from rarefy.kernels.native import Layout

# As the extension numbers them; its 0 is float32, which has tiles of its own.
_NUMBERS = {torch.bfloat16: 1, torch.float16: 2}
_LEAST_TOKENS = 64  # of fewer, weights with many connections take longer to convert than is gained


def serves(x: Tensor, values: Tensor) -> bool:
    """Whether tiles in float16 are in use and take this call: activations that autocast made, float32 values.

    Args:
        x: [..., columns], at least 64 tokens.
        values: of the weight.

    Example:
        >>> serves(torch.zeros(64, 8), torch.zeros(3))
        False
    """
    if x.dtype not in _NUMBERS or values.dtype is not torch.float32 or not takes_half():
        return False
    on_cpu = x.is_cpu and values.is_cpu
    return on_cpu and values.numel() > 0 and x.numel() >= _LEAST_TOKENS * x.shape[-1]


def forward(x: Tensor, values: Tensor, bias: Tensor | None, weight: Layout) -> Tensor | None:
    """X · Wᵀ + bias for contiguous x [..., columns]; values and bias float32, contiguous.

    None where a number is infinite or NaN, or the call has too few tokens.
    """
    module = extension()
    if module is None or not serves(x, values):
        return None
    y = x.new_empty(*x.shape[:-1], weight.rows)
    done = module.half_forward(
        tokens=x.numel() // weight.columns,
        weight=native.described(module, weight),
        values=values.data_ptr(),
        x=x.data_ptr(),
        bias=0 if bias is None else bias.data_ptr(),
        y=y.data_ptr(),
        element=_NUMBERS[x.dtype],
        threads=torch.get_num_threads(),
    )
    return y if done else None


def backward(
    grad: Tensor, x: Tensor, values: Tensor, transposed: Layout, order: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Gradients of x, values and bias (empty where not needed), for contiguous grad and x of one dtype.

    None where a number is infinite or NaN, the call has too few tokens, or only the bias needs a gradient.
    """
    module = extension()
    if module is None or not (needs[0] or needs[1]) or not serves(x, values):
        return None
    grad_x = torch.empty_like(x) if needs[0] else x.new_empty(0)
    grad_values = torch.empty_like(values) if needs[1] else values.new_empty(0)
    # The columns of the transpose are the outputs.
    grad_bias = values.new_empty(transposed.columns if needs[2] else 0)
    done = module.half_backward(
        tokens=x.shape[0],
        transposed=native.described(module, transposed),
        order=order.data_ptr(),
        values=values.data_ptr(),
        x=x.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad_x.data_ptr() if needs[0] else 0,
        grad_values=grad_values.data_ptr() if needs[1] else 0,
        grad_bias=grad_bias.data_ptr() if needs[2] else 0,
        element=_NUMBERS[x.dtype],
        threads=torch.get_num_threads(),
    )
    return (grad_x, grad_values, grad_bias) if done else None
