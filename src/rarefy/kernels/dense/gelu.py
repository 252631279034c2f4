"""The nonlinearity of GPT-2, which torch computes on the CPU in four times the time of its exact sibling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.kernels import native
from rarefy.torch_private import has_forward_gradients, is_batched

_LEAST = 1 << 14  # entries: with fewer, the way here takes longer than it saves
_BACKWARD = torch.ops.aten.gelu_backward.default


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU with the tangent, `approximate="tanh"` of torch: x / 2 · (1 + tanh(√(2/π) · (x + 0.044715 · x³))).

    Large float32 tensors on the CPU go to a kernel, forward and backward. It differs from the exact value by at most
    3e-7 · |x|, the derivative by 5e-7, the same bits for any number of threads. torch computes everything else: other
    dtypes and devices, second derivatives, transforms, forward-mode gradients, what is traced or compiled, subclasses.

    Args:
        x: of any shape.

    Example:
        >>> tanh_gelu(torch.tensor([-1.0, 0.0, 1.0]))
        tensor([-0.1588,  0.0000,  0.8412])

    Reference:
        Hendrycks and Gimpel, Gaussian Error Linear Units, arXiv 1606.08415.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    # Asked first: what stands for a tensor while a graph is recorded cannot be compared with a number.
    is_plain = type(x) in (Tensor, nn.Parameter)
    if is_traced or not is_plain or x.numel() < _LEAST or not _is_readable(x):
        return functional.gelu(x, approximate="tanh")
    if torch.is_grad_enabled() and x.requires_grad:
        return _TanhGelu.apply(x)  # pyright: ignore[reportReturnType]
    return native.tanh_gelu(x, None)


class _TanhGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return native.tanh_gelu(x, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        [grad] = grads
        [x] = ctx.saved_tensors  # hooks on saved tensors may have put it elsewhere
        is_watched = torch.is_grad_enabled() or is_batched(grad)
        if is_watched or not _is_readable(x):
            return _BACKWARD(grad, x, approximate="tanh")
        full = grad if grad.is_contiguous() else grad.contiguous()
        return native.tanh_gelu(x, full) if _is_readable(full) else _BACKWARD(grad, x, approximate="tanh")


def _is_readable(tensor: Tensor) -> bool:
    """Whether the kernel may read this memory, and nobody watches what is done with it."""
    is_full = tensor.layout is torch.strided and not tensor.is_nested and tensor.is_contiguous()
    if not (is_full and tensor.dtype is torch.float32 and tensor.is_cpu) or has_forward_gradients():
        return False
    with torch.no_grad():  # a gradient is what the kernel has itself
        return native.has("tanh_gelu") and native.unwatched(tensor)
