"""Causal attention, in blocks of queries where that is faster on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rarefy.decoder import bfloat16_attention
from rarefy.torch_private import has_transform

_QUERY_BLOCK = 128
# Measured: below, blocks are overhead; from 768 on torch takes larger blocks itself.
_BLOCKS_PAY = range(257, 768)
_BFLOAT16_PAYS = range(64, 768)
_SCORES_AT_ONCE = 1 << 20


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float = 0.0) -> Tensor:
    """Attention in which each position sees itself and what came before.

    On the CPU the queries of middling sequences go in blocks, each with the keys that it may see: torch's kernel
    computes the scores of all keys there, twice what is needed. Training in bfloat16 without dropout has a path
    of its own where `bfloat16_attention.is_fast()`.

    Args:
        query: [batch, heads, sequence, head size].
        key: the same shape.
        value: the same shape.
        dropout_rate: of the attention weights, in [0, 1).

    Returns:
        [batch, sequence, heads, head size].

    Example:
        >>> heads = torch.randn(2, 3, 300, 4)
        >>> causal_attention(heads, heads, heads).shape
        torch.Size([2, 300, 3, 4])
    """
    length = query.shape[2]
    # A graph keeps the branch that it was made with, and must do for other lengths.
    is_traced = isinstance(length, torch.SymInt) or torch.compiler.is_compiling() or torch.jit.is_tracing()
    is_on_cpu = not is_traced and query.device.type == "cpu"
    if is_on_cpu and not dropout_rate and length in _BFLOAT16_PAYS and _trains_in_bfloat16(query, key, value):
        return _few_samples_at_a_time(query, key, value)
    if is_on_cpu and length in _BLOCKS_PAY:
        return _in_blocks(partial(_attend, dropout_rate=dropout_rate), query, key, value)
    attend = functional.scaled_dot_product_attention
    return attend(query, key, value, dropout_p=dropout_rate, is_causal=True).transpose(1, 2)


def _trains_in_bfloat16(*heads: Tensor) -> bool:
    """Whether the path of its own takes these."""
    is_plain = not has_transform() and all(type(tensor) is Tensor for tensor in heads)
    fits = (
        all(t.dtype == torch.bfloat16 and t.shape == heads[0].shape for t in heads) and heads[0].numel() > 0
    )
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in heads)
    # Autocast to another dtype would convert what the products below are made of.
    stays = not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == torch.bfloat16
    return is_plain and fits and stays and has_gradient and bfloat16_attention.is_fast()


def _few_samples_at_a_time(*heads: Tensor) -> Tensor:
    _, number, length, _ = heads[0].shape
    at_once = max(1, _SCORES_AT_ONCE // (number * min(length, _QUERY_BLOCK) * length))
    samples = zip(*(tensor.split(at_once) for tensor in heads), strict=True)
    return torch.cat([_as_one_sample(*chunk) for chunk in samples])


def _as_one_sample(*heads: Tensor) -> Tensor:
    """Attention of all samples' heads, as if they were those of one."""
    mixed = _in_blocks(
        _attend_in_bfloat16, *(tensor.contiguous().flatten(0, 1).unsqueeze(0) for tensor in heads)
    )
    return mixed[0].unflatten(1, heads[0].shape[:2]).transpose(0, 1)


def _in_blocks(attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    length = query.shape[2]
    ends = tuple(min(begin + _QUERY_BLOCK, length) for begin in range(0, length, _QUERY_BLOCK))
    blocks = zip(query.split(_QUERY_BLOCK, 2), prefixes(key, ends), prefixes(value, ends), strict=True)
    return torch.cat([attend(*block) for block in blocks], dim=1)


def _attend_in_bfloat16(*heads: Tensor) -> Tensor:
    """As `_attend`, for one sample."""
    return bfloat16_attention.attend(*(tensor[0] for tensor in heads)).transpose(0, 1).unsqueeze(0)


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float) -> Tensor:
    """The part of one block of queries, the last of the positions of `key`."""
    begin = key.shape[2] - query.shape[2]
    # torch's `is_causal` lets the first query see the first key only, which is wrong for any later block.
    sees = query.new_ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(begin) if begin else None
    attend = functional.scaled_dot_product_attention
    return attend(query, key, value, sees, dropout_rate, is_causal=begin == 0).transpose(1, 2)


def prefixes(tensor: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
    """The first positions of a tensor [batch, heads, sequence, size], as views that are not written to.

    The gradient of each plain slice is a tensor of the size of all positions, mostly zeros; here gradients are added as
    they are.

    Args:
        tensor: as above.
        ends: how many positions each view has, rising; the last has all.

    Example:
        >>> [part.shape[2] for part in prefixes(torch.ones(1, 1, 5, 1), [2, 4, 5])]
        [2, 4, 5]
    """
    return _Prefixes.apply(tensor, ends)


class _Prefixes(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tensor: Tensor, ends: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(tensor[:, :, :end] for end in ends)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.ends = inputs[1]

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> tuple[Tensor, ...]:
        return _Prefixes.forward(grad_inputs[0], ctx.ends)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        sums = list[Tensor]()
        begin = 0
        for number, end in enumerate(ctx.ends):
            first, *others = (grad[:, :, begin:end] for grad in grad_outputs[number:])
            sums.append(sum(others, first))
            begin = end
        return torch.cat(sums, 2), None
