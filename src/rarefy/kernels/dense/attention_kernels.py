"""Causal attention on the CPU by kernels: in bfloat16 with a matrix unit, in float32 with vectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import native
from rarefy.kernels.dense import attention_calls
from rarefy.kernels.instruction_sets import matrix_unit, on_intel
from rarefy.torch_private import has_forward_gradients, is_batched

# With fewer positions most of a tile is padding; with more, scores outgrow the cache, or it was not measured.
LENGTHS = {torch.bfloat16: range(32, 8193), torch.float32: range(64, 4097)}
_LARGEST_HEAD = 512


def takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `native_attention` takes these: plain heads of one shape, where it was found to be faster.

    bfloat16 needs a matrix unit, float32 a processor of Intel's with AVX-512.

    Args:
        query: [batch, heads, sequence, head size].
        key: the same shape.
        value: the same shape.

    Example:
        >>> heads = torch.zeros(1, 1, 64, 8, dtype=torch.float64)
        >>> takes_attention(heads, heads, heads)
        False
    """
    if not _fit(query, key, value) or not _pays(query) or has_forward_gradients():
        return False
    with torch.no_grad():  # a gradient is what the kernel has itself
        return native.unwatched(query, key, value)


def _fit(*heads: Tensor) -> bool:
    """Whether a kernel could compute with these."""
    query = heads[0]
    lengths = LENGTHS.get(query.dtype)
    if lengths is None or any(
        type(t) is not Tensor or t.dtype != query.dtype or not t.is_cpu or t.layout is not torch.strided
        for t in heads
    ):
        return False
    if query.dim() != 4 or any(t.shape != query.shape for t in heads) or query.numel() == 0:
        return False
    return query.shape[2] in lengths and query.shape[3] <= _LARGEST_HEAD and native.has("attention_forward")


def _pays(query: Tensor) -> bool:
    if query.dtype == torch.bfloat16:
        return matrix_unit() == "v4_amx"
    # Found to be faster than torch there; elsewhere it was not measured. The heads are what threads share.
    samples, number, _, _ = query.shape
    return on_intel() and samples * number >= torch.get_num_threads()


def native_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q·Kᵀ/√d)·V where each position sees itself and what came before; only where `takes_attention`.

    Of bfloat16 sums are float32, and the weights are rounded to bfloat16 before they are multiplied, as in torch's
    kernel. In float32 a position takes nothing from a later one, not even where that is NaN or infinite. The same bits
    for any number of threads.

    Args:
        query: [batch, heads, sequence, head size], on the CPU; the last dimension is contiguous or copied.
        key: the same shape.
        value: the same shape.

    Returns:
        [batch, sequence, heads, head size].

    Example:
        >>> heads = torch.ones(1, 2, 64, 8, dtype=torch.bfloat16)
        >>> if takes_attention(heads, heads, heads):
        ...     assert native_attention(heads, heads, heads).shape == (1, 64, 2, 8)

    Reference:
        Dao et al., FlashAttention, arXiv 2205.14135, for the backward pass that computes the weights anew.
    """
    if torch.is_grad_enabled() and any(heads.requires_grad for heads in (query, key, value)):
        return _Attention.apply(query, key, value)  # pyright: ignore[reportReturnType]
    return attention_calls.forward(query, key, value)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *heads: Tensor) -> Tensor:
        mixed, softmax = attention_calls.forward(*heads)
        ctx.save_for_backward(*heads, mixed, softmax)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        [grad] = grads
        # Hooks on saved tensors may have put them elsewhere.
        query, key, value, mixed, softmax = ctx.saved_tensors
        is_watched = torch.is_grad_enabled() or is_batched(grad)
        if is_watched or not _are_readable(softmax, grad, query, key, value, mixed):
            return gradients(query, key, value, grad)
        return attention_calls.backward((query, key, value, mixed, grad), softmax)


def _are_readable(softmax: Tensor, *tensors: Tensor) -> bool:
    """Whether the kernel may read what came back: hooks may have changed it, or the kernels are switched off."""
    has_dtypes = softmax.dtype == torch.float32 and all(t.dtype == tensors[0].dtype for t in tensors)
    if (
        not has_dtypes
        or not all(t.is_cpu for t in (softmax, *tensors))
        or not native.has("attention_backward")
    ):
        return False
    with torch.no_grad():
        return native.unwatched(softmax, *tensors)


def gradients(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients in operations of torch, of which it knows the derivatives.

    Args:
        query: [batch, heads, sequence, head size].
        key: the same shape.
        value: the same shape.
        grad: [batch, sequence, heads, head size].

    Returns:
        The gradients of the first three.
    """
    scale = query.shape[3] ** -0.5
    later = query.new_ones(query.shape[2], query.shape[2], dtype=torch.bool).triu(1)
    wide = [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (query, key, value)]
    weights = (wide[0] @ wide[1].mT * scale).masked_fill(later, -torch.inf).softmax(-1)
    mixed = grad.transpose(1, 2).to(weights.dtype)
    of_weights = mixed @ wide[2].mT
    of_scores = weights * (of_weights - (weights * of_weights).sum(-1, keepdim=True)) * scale
    found = of_scores @ wide[1], of_scores.mT @ wide[0], weights.mT @ mixed
    return tuple(part.to(query.dtype) for part in found)
