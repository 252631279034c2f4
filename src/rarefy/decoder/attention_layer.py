"""Self-attention of a decoder layer: multi-head, multi-query or grouped-query."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.decoder.attention import causal_attention
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.rotary import Rotation, rotate


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
        narrow = config.key_heads * config.head_size
        bias = config.use_projection_bias_in_attention
        self.proj_q_dense_layer = nn.Linear(size, inner, bias=bias)
        self.proj_k_dense_layer = nn.Linear(size, narrow, bias=bias)
        self.proj_v_dense_layer = nn.Linear(size, narrow, bias=bias)
        self.proj_output_dense_layer = nn.Linear(inner, size, bias=config.use_ffn_bias_in_attention)
        self.num_heads = config.num_heads
        self.key_heads = config.key_heads
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
            query = rotate(query, rotation)
            key = rotate(key, rotation)
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
    precise = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=precise).to(value.dtype)
    return (functional.dropout(weights, dropout_rate) @ value).transpose(1, 2)
