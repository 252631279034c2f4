"""Attention of a block of queries in bfloat16, for processors that multiply bfloat16 matrices."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from rarefy.torch_private import softmax_backward


@cache
def is_fast() -> bool:
    """Whether torch may use AVX-512 here, with instructions for bfloat16 and no matrix unit, for which it has kernels.

    Example:
        >>> is_fast() in (True, False)
        True
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()
    may_use = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return may_use and bool(has.get("avx512_bf16")) and not has.get("amx_bf16")


def is_torchs(query: Tensor) -> bool:
    """Whether torch attends to all of these queries in less time than to blocks of them: bfloat16 with a matrix unit.

    Example:
        >>> is_torchs(torch.ones(1))
        False
    """
    has = getattr(torch.cpu, "get_capabilities", dict)()
    return query.dtype == torch.bfloat16 and bool(has.get("amx_bf16"))


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(Q·Kᵀ/√d)·V, where the queries are the last positions of the keys and see no later ones.

    torch's kernel takes three times as long for the gradients there. This one keeps the attention weights, of 2 bytes
    each, for the backward pass. What rounding leaves out of the scores is computed by a second product and added, so
    that they have 16 significant bits.

    Args:
        query: [batch, queries, head size], bfloat16.
        key: [batch, positions, head size], bfloat16.
        value: the same shape.

    Returns:
        [batch, queries, head size], bfloat16.

    Example:
        >>> heads = torch.ones(1, 3, 2, dtype=torch.bfloat16)
        >>> attend(heads[:, 1:], heads, heads).shape
        torch.Size([1, 2, 2])
    """
    return _Attention.apply(query, key, value)[0]


def _weights(query: Tensor, key: Tensor) -> Tensor:
    """The attention weights [batch, queries, positions]."""
    queries = query.shape[1]
    scale = query.shape[2] ** -0.5
    transposed = key.transpose(1, 2)
    # The scale costs nothing within the product; with beta=0 torch does not read the first operand.
    rounded = torch.baddbmm(query.new_empty(1, 1, 1), query, transposed, beta=0, alpha=scale)
    rest = torch.baddbmm(rounded, query, transposed, beta=-1, alpha=scale)
    scores = rounded.to(torch.promote_types(rounded.dtype, torch.float32)).add_(rest)
    later = query.new_ones(queries, queries, dtype=torch.bool).triu(1)
    scores[:, :, -queries:].masked_fill_(later, -torch.inf)
    return scores.softmax(-1).to(query.dtype)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        weights = _weights(query, key)
        # An output as well, or second derivatives could not go through what was saved.
        return weights @ value, weights

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, output[1])
        # The weights' own gradient is asked for by second derivatives only; zeros for it would be a large tensor.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, ...]:
        query, key, value, weights = ctx.saved_tensors
        mixed = torch.zeros_like(query) if grads[0] is None else grads[0]
        of_weights = mixed @ value.transpose(1, 2)
        if grads[1] is not None:  # by second derivatives
            of_weights = of_weights + grads[1]
        of_scores = softmax_backward(of_weights, weights)
        unused = query.new_empty(1, 1, 1)
        scale = query.shape[2] ** -0.5
        of_query = torch.baddbmm(unused, of_scores, key, beta=0, alpha=scale)
        of_key = torch.baddbmm(unused, of_scores.transpose(1, 2), query, beta=0, alpha=scale)
        return of_query, of_key, weights.transpose(1, 2) @ mixed
