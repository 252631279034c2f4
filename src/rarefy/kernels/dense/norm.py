"""What stands between the products of a decoder layer under autocast to bfloat16: the norm before, the sum after."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.kernels.dense import calls
from rarefy.torch_private import is_batched


def norm_for_products(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """Layer normalisation over the last dimension, of which products alone take the result.

    Under autocast to bfloat16 on the CPU, where products convert what they take, the result of float32 is bfloat16: it
    is converted once and not by each product, and so is its gradient. torch computes everything else.

    Args:
        x: [..., columns].
        weight: [columns], or None.
        bias: [columns], or None.
        epsilon: added to the variance.

    Example:
        >>> norm_for_products(torch.tensor([[1.0, 3.0]]), None, None, 0.0)
        tensor([[-1.,  1.]])

    Reference:
        Ba et al., Layer Normalization, arXiv 1607.06450.
    """
    given = [tensor for tensor in (x, weight, bias) if tensor is not None]
    if not _is_bfloat16() or not _takes_norm(x, given):
        return functional.layer_norm(x, x.shape[-1:], weight, bias, epsilon)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Norm.apply(x, weight, bias, epsilon)  # pyright: ignore[reportReturnType]
    return calls.norm(x, weight, bias, epsilon)[0]


def plus(stream: Tensor, part: Tensor) -> Tensor:
    """Stream + part, of which the part may be bfloat16 beside a stream of float32.

    Args:
        stream: what goes on.
        part: the same shape.

    Example:
        >>> plus(torch.ones(2), torch.ones(2, dtype=torch.bfloat16))
        tensor([2., 2.])
    """
    fits = stream.dtype == torch.float32 and part.dtype == torch.bfloat16 and stream.shape == part.shape
    if not fits or not calls.takes("add_part", stream, part):
        return stream + part
    if torch.is_grad_enabled() and (stream.requires_grad or part.requires_grad):
        return _Plus.apply(stream, part)  # pyright: ignore[reportReturnType]
    return calls.add_part(stream, part)


def _is_bfloat16() -> bool:
    return torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16


def _takes_norm(x: Tensor, given: list[Tensor]) -> bool:
    if any(tensor.dtype != torch.float32 for tensor in given) or x.dim() == 0 or x.numel() == 0:
        return False
    # Of other shapes the kernel would read past the end; torch says what is wrong with them.
    fits = all(tensor.shape == x.shape[-1:] for tensor in given[1:])
    return fits and calls.takes("norm_forward", *given)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
        y, statistics = calls.norm(x, weight, bias, epsilon)
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.epsilon = epsilon
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [grad] = grads
        x, weight, bias, statistics = ctx.saved_tensors  # hooks on saved tensors may have put them elsewhere
        is_watched = torch.is_grad_enabled() or is_batched(grad)
        full = grad if is_watched else grad.contiguous()
        given = [tensor for tensor in (x, weight, statistics) if tensor is not None]
        if is_watched or not calls.takes("norm_backward", full, *given):
            return (*norm_gradients(grad, x, weight, bias, ctx.epsilon), None)
        return (*calls.norm_gradients(full, x, weight, statistics, bias is not None), None)


def norm_gradients(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float
) -> tuple[Tensor | None, ...]:
    """Gradients of x, weight and bias in operations of torch, of which it knows the derivatives.

    Args:
        grad: of the norm.
        x: [..., columns], as the others in `norm_for_products`.
        weight: [columns], or None.
        bias: [columns], or None.
        epsilon: added to the variance.
    """
    grad = grad.to(x.dtype)
    centred = x - x.mean(-1, keepdim=True)
    inverse = (centred.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normed = centred * inverse
    slopes = grad if weight is None else grad * weight
    means = slopes.mean(-1, keepdim=True), (slopes * normed).mean(-1, keepdim=True)
    of_x = (slopes - means[0] - normed * means[1]) * inverse
    of_weight = None if weight is None else (grad * normed).reshape(-1, x.shape[-1]).sum(0)
    return of_x, of_weight, None if bias is None else grad.reshape(-1, x.shape[-1]).sum(0)


class _Plus(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, stream: Tensor, part: Tensor) -> Tensor:
        return calls.add_part(stream, part)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        [grad] = grads
        return grad, grad.to(torch.bfloat16)
