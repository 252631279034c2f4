"""Self-attention of a decoder layer: what each position may see, queries in blocks, and the layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.decoder import bfloat16_attention
from rarefy.decoder.decoder_config import GPTConfig, RotaryPairs
from rarefy.decoder.rotary import Rotation, rotate
from rarefy.kernels import native_attention, takes_attention
from rarefy.torch_private import has_transform

_QUERY_BLOCK = 128
# Measured: below, blocks are overhead; from 768 on torch takes larger blocks itself.
_BLOCKS_PAY = range(257, 768)
_BFLOAT16_PAYS = range(64, 768)
_SCORES_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class SequenceContext:
    """What every layer is told about the positions of a sequence; made once a forward pass.

    Args:
        rotation: turns queries and keys; None without rotary positions.
        mask: of the layers that see everything before: a bool mask or a bias that is added to the scores; None
            where plain causal attention is meant.
        windowed_mask: the same for the layers with a sliding window.
    """

    rotation: Rotation | None = None
    mask: Tensor | None = None
    windowed_mask: Tensor | None = None


def visible(length: int, window: int | None, sinks: int, device: torch.device) -> Tensor:
    """Who sees whom [query, key]: what came before, itself, no farther back than the window, and the sink tokens.

    Example:
        >>> visible(4, 2, 1, torch.device("cpu")).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    positions = torch.arange(length, device=device)
    distance = positions.unsqueeze(1) - positions
    seen = distance >= 0
    if window is not None:
        seen &= (distance < window) | (positions < sinks)
    return seen


def mask_of(
    length: int, window: int | None, sinks: int, bias: Tensor | None, device: torch.device
) -> Tensor | None:
    """The mask of a layer; None where torch's causal attention does the same.

    Args:
        length: of the sequence.
        window: how many positions are seen, the own one included; None for all.
        sinks: how many of the first positions are always seen.
        bias: added to the scores [heads, query, key]; None for none.
        device: where to make it.
    """
    # A window as long as the sequence hides nothing, and torch's causal kernel needs no mask in memory.
    has_window = window is not None and window < length
    if bias is None:
        return visible(length, window, sinks, device) if has_window else None
    return bias.masked_fill(~visible(length, window, sinks, device), -torch.inf)


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout_rate: float = 0.0) -> Tensor:
    """Attention in which each position sees itself and what came before.

    Without dropout, bfloat16 goes to a kernel where the processor has a matrix unit, and float32 where it is one of
    Intel's with AVX-512. Otherwise the queries of middling sequences go in blocks on the CPU, each with the keys that
    it may see: torch's kernel computes the scores of all keys there, twice what is needed. Training in bfloat16 without
    dropout has a path of its own where `bfloat16_attention.is_fast()`.

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
    if is_on_cpu and not dropout_rate and _stays(query.dtype):
        if takes_attention(query, key, value):
            return native_attention(query, key, value)
        if length in _BFLOAT16_PAYS and _trains_in_bfloat16(query, key, value):
            return _few_samples_at_a_time(query, key, value)
    if is_on_cpu and length in _BLOCKS_PAY and not bfloat16_attention.is_torchs(query):
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
    return is_plain and fits and has_gradient and bfloat16_attention.is_fast()


def _stays(dtype: torch.dtype) -> bool:
    """Whether these remain what they are: autocast to another dtype would convert them."""
    return not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") == dtype


def _few_samples_at_a_time(*heads: Tensor) -> Tensor:
    _, number, length, _ = heads[0].shape
    # As many samples as keep the scores of one block of queries within a few megabytes.
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
            # These positions are in this prefix and in every longer one.
            first, *others = (grad[:, :, begin:end] for grad in grad_outputs[number:])
            sums.append(sum(others, first))
            begin = end
        return torch.cat(sums, 2), None


class CausalSelfAttention(nn.Module):
    """Attention in which each position sees itself and what came before.

    Args:
        config: of the model.
        scale: what the product of a query and a key is multiplied by.

    Reference:
        Shazeer, arXiv 1911.02150 (multi-query); Ainslie et al., arXiv 2305.13245 (grouped-query).
    """

    def __init__(self, config: GPTConfig, scale: float) -> None:
        super().__init__()
        size = config.hidden_size
        inner = config.inner_size
        # Of grouped queries keys and values have fewer heads.
        narrow = config.key_heads * config.head_size
        bias = config.use_projection_bias_in_attention
        self.proj_q_dense_layer = nn.Linear(size, inner, bias=bias)
        self.proj_k_dense_layer = nn.Linear(size, narrow, bias=bias)
        self.proj_v_dense_layer = nn.Linear(size, narrow, bias=bias)
        self.proj_output_dense_layer = nn.Linear(inner, size, bias=config.use_ffn_bias_in_attention)
        self.num_heads = config.num_heads
        self.key_heads = config.key_heads
        self.rotary_pairs: RotaryPairs = config.rotary_pairs
        self.softcap = config.attention_logit_softcapping
        rate = config.attention_dropout_rate
        self.dropout_rate = config.dropout_rate if rate is None else rate
        # Torch's attention divides by the root of the head size; the query makes up for what differs.
        factor = scale * math.sqrt(config.head_size)
        self.query_factor = 1.0 if math.isclose(factor, 1.0) else factor

    def forward(self, hidden: Tensor, rotation: Rotation | None = None, mask: Tensor | None = None) -> Tensor:
        """[batch, sequence, hidden] to the same shape; `mask` as in `SequenceContext`."""
        query = self.proj_q_dense_layer(hidden).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
        key = self.proj_k_dense_layer(hidden).unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        value = self.proj_v_dense_layer(hidden).unflatten(2, (self.key_heads, -1)).transpose(1, 2)
        if rotation is not None:
            query = rotate(query, rotation, self.rotary_pairs)
            key = rotate(key, rotation, self.rotary_pairs)
        if self.query_factor != 1.0:
            query = query * self.query_factor
        if self.key_heads != self.num_heads:
            repeats = self.num_heads // self.key_heads
            key = key.repeat_interleave(repeats, dim=1)
            value = value.repeat_interleave(repeats, dim=1)
        return self.proj_output_dense_layer(self._mix(query, key, value, mask).flatten(2))

    def _mix(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        rate = self.dropout_rate if self.training else 0.0
        if self.softcap is not None:
            return capped_attention(query, key, value, mask, self.softcap, rate)
        if mask is None:
            return causal_attention(query, key, value, rate)
        # torch takes a bias in the dtype of the queries only.
        if mask.dtype != torch.bool:
            mask = mask.to(query.dtype)
        attend = functional.scaled_dot_product_attention
        return attend(query, key, value, mask, rate).transpose(1, 2)


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, cap: float, dropout_rate: float = 0.0
) -> Tensor:
    """Causal attention whose scores are bent to stay within (−cap, cap): cap · tanh(score / cap).

    Args:
        query: [batch, heads, sequence, head size].
        key: the same shape.
        value: the same shape.
        mask: True where a position is seen, or a bias that is added after the cap; None for all that came before.
        cap: the bound, above 0.
        dropout_rate: of the attention weights.

    Returns:
        [batch, sequence, heads, head size].

    Example:
        >>> heads = torch.ones(1, 1, 3, 2)
        >>> capped_attention(heads, heads, heads, None, 50.0).shape
        torch.Size([1, 3, 1, 2])
    """
    scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
    scores = cap * torch.tanh(scores / cap)
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    is_bool = mask.dtype == torch.bool
    scores = scores.masked_fill(~mask, -torch.inf) if is_bool else scores + mask.to(scores.dtype)
    # At least float32: a softmax in bfloat16 loses what is small.
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(value.dtype)
    return (functional.dropout(weights, dropout_rate) @ value).transpose(1, 2)
