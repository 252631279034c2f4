"""GELU where torch takes several times as long as reading its input: with the tangent, and in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.kernels.dense import calls
from rarefy.kernels.instruction_sets import matrix_unit
from rarefy.torch_private import is_batched

_LEAST = 1 << 14  # entries: with fewer, the way here takes longer than it saves
_BACKWARD = torch.ops.aten.gelu_backward.default
_APPROXIMATIONS = {"gelu_tanh": "tanh", "gelu_exact": "none"}


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU with the tangent, `approximate="tanh"` of torch: x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))).

    Large tensors of float32 or bfloat16 on the CPU go to a kernel, forward and backward. Before it is rounded to
    bfloat16, it differs from the exact value by at most 3e-7 · |x|, the derivative by 5e-7, the same bits for any
    number of threads. torch computes everything else: other dtypes and devices, second derivatives, transforms,
    forward-mode gradients, what is traced or compiled, subclasses.

    Args:
        x: of any shape.

    Example:
        >>> tanh_gelu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])

    Reference:
        Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """
    return _gelu("gelu_tanh", x)


def exact_gelu(x: Tensor) -> Tensor:
    """GELU, `approximate="none"` of torch: x times the share of the normal distribution below x.

    As `tanh_gelu`, but for bfloat16 on processors with a matrix unit alone: only there it was found to be faster.

    Args:
        x: of any shape.

    Example:
        >>> exact_gelu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1587,  0.0000,  0.8413])
    """
    pays = x.dtype == torch.bfloat16 and not calls.is_traced() and matrix_unit() == "v4_amx"
    return _gelu("gelu_exact", x) if pays else functional.gelu(x)


def _gelu(name: str, x: Tensor) -> Tensor:
    # In this order: what stands for a tensor while a graph is recorded cannot be compared with a number.
    if not calls.takes(name, x) or x.numel() < _LEAST:
        return functional.gelu(x, approximate=_APPROXIMATIONS[name])
    if torch.is_grad_enabled() and x.requires_grad:
        return _Gelu.apply(x, name)  # pyright: ignore[reportReturnType]
    return calls.gelu(name, x, None)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.name = name
        return calls.gelu(name, x, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        [grad] = grads
        [x] = ctx.saved_tensors  # hooks on saved tensors may have put it elsewhere
        is_watched = torch.is_grad_enabled() or is_batched(grad)
        full = grad if is_watched else grad.contiguous()
        if is_watched or grad.dtype != x.dtype or not calls.takes(ctx.name, x, full):
            return _BACKWARD(grad, x, approximate=_APPROXIMATIONS[ctx.name]), None
        return calls.gelu(ctx.name, x, full), None
