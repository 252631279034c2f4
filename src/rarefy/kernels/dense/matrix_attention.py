"""Causal attention in bfloat16 with the matrix unit of the processor, where it has one that kernels were built for."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels import native
from rarefy.kernels.instruction_sets import extension, matrix_unit
from rarefy.torch_private import has_forward_gradients, is_batched

# With fewer positions most of a tile is padding; with more the scores of a block of queries outgrow the cache.
LENGTHS = range(32, 8193)
_LARGEST_HEAD = 512


def takes_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `matrix_attention` takes these: plain bfloat16 on a processor with a matrix unit, of one shape.

    Example:
        >>> heads = torch.zeros(1, 1, 64, 8)
        >>> takes_attention(heads, heads, heads)
        False
    """
    heads = (query, key, value)
    if any(type(t) is not Tensor or t.dtype != torch.bfloat16 or not t.is_cpu for t in heads):
        return False
    fits = query.dim() == 4 and query.shape == key.shape == value.shape and query.numel() > 0
    if not fits or query.shape[2] not in LENGTHS or query.shape[3] > _LARGEST_HEAD:
        return False
    if matrix_unit() != "v4_amx" or not native.has("attention_forward") or has_forward_gradients():
        return False
    with torch.no_grad():  # a gradient is what the kernel has itself
        return native.unwatched(*heads)


def matrix_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q·Kᵀ/√d)·V where each position sees itself and what came before; only where `takes_attention`.

    Products are of bfloat16 with sums in float32; the weights are rounded to bfloat16 before they are multiplied, as in
    torch's kernel. The same bits for any number of threads.

    Args:
        query: [batch, heads, sequence, head size], bfloat16 on the CPU; the last dimension is contiguous or copied.
        key: the same shape.
        value: the same shape.

    Returns:
        [batch, sequence, heads, head size].

    Example:
        >>> heads = torch.ones(1, 2, 64, 8, dtype=torch.bfloat16)
        >>> if takes_attention(heads, heads, heads):
        ...     assert matrix_attention(heads, heads, heads).shape == (1, 64, 2, 8)

    Reference:
        Dao et al., FlashAttention, arXiv 2205.14135, for the backward pass that computes the weights anew.
    """
    if torch.is_grad_enabled() and any(heads.requires_grad for heads in (query, key, value)):
        return _Attention.apply(query, key, value)  # pyright: ignore[reportReturnType]
    return native_forward(query, key, value)[0]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *heads: Tensor) -> Tensor:
        mixed, logs = native_forward(*heads)
        ctx.save_for_backward(*heads, mixed, logs)
        return mixed

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        [grad] = grads
        query, key, value, mixed, logs = (
            ctx.saved_tensors
        )  # hooks on saved tensors may have put them elsewhere
        with torch.no_grad():
            is_readable = (
                native.unwatched(grad, query, key, value, mixed, logs) and grad.is_cpu and query.is_cpu
            )
        if torch.is_grad_enabled() or is_batched(grad) or not is_readable:
            return gradients(query, key, value, grad)
        return native_backward((query, key, value, mixed, grad), logs)


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


def native_forward(*heads: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed values [batch, sequence, heads, head size], and the logarithms that the backward pass takes."""
    query, key, value = (_rows(tensor) for tensor in heads)
    samples, number, length, size = query.shape
    mixed = query.new_empty(samples, length, number, size)
    logs = torch.empty(samples, number, length, dtype=torch.float32, device="cpu")
    module: Any = extension()
    module.attention_forward(
        shape=_shape(module, query),
        query=_heads(module, query),
        key=_heads(module, key),
        value=_heads(module, value),
        mixed=mixed.data_ptr(),
        logs=logs.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return mixed, logs


def native_backward(tensors: tuple[Tensor, ...], logs: Tensor) -> tuple[Tensor, ...]:
    """Gradients, shaped as the heads, from query, key, value, mixed values and their gradient."""
    query, key, value = (_rows(tensor) for tensor in tensors[:3])
    mixed, grad = (_rows(tensor).transpose(1, 2) for tensor in tensors[3:])
    samples, number, length, size = query.shape
    found = [query.new_empty(samples, length, number, size) for _ in range(3)]
    logs = logs.contiguous()
    module: Any = extension()
    module.attention_backward(
        shape=_shape(module, query),
        query=_heads(module, query),
        key=_heads(module, key),
        value=_heads(module, value),
        mixed=_heads(module, mixed),
        grad=_heads(module, grad),
        logs=logs.data_ptr(),
        grad_query=found[0].data_ptr(),
        grad_key=found[1].data_ptr(),
        grad_value=found[2].data_ptr(),
        threads=torch.get_num_threads(),
    )
    return tuple(part.transpose(1, 2) for part in found)


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _shape(module: Any, query: Tensor) -> Any:
    samples, number, length, size = query.shape
    scale = 1 / math.sqrt(size)
    return module.AttentionShape(samples=samples, heads=number, length=length, size=size, scale=scale)


def _heads(module: Any, heads: Tensor) -> Any:
    """Where [batch, heads, sequence, head size] lies; the address must not outlive the call that it is made for."""
    sample, head, position, _ = heads.stride()
    return module.Heads(data=heads.data_ptr(), sample=sample, position=position, head=head)
