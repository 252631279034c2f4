"""The layers of the decoder and the stack of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rarefy.decoder.attention import CausalSelfAttention, SequenceContext
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.experts import Experts, Routing
from rarefy.decoder.feed_forward import FeedForward
from rarefy.kernels import norm_for_products, plus


class TransformerDecoder(nn.Module):
    """The stack of decoder layers.

    Args:
        config: of the model.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        kind = ParallelDecoderLayer if config.is_parallel else DecoderLayer
        self.layers = nn.ModuleList(kind(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self, hidden: Tensor, input_ids: Tensor, context: SequenceContext, routings: list[Routing]
    ) -> Tensor:
        """Applies every layer to [batch, sequence, hidden]; layers with experts append to `routings`."""
        for layer in self.layers:
            hidden = layer(hidden, input_ids, context, routings)
        return hidden


class _Layer(nn.Module):
    """What both kinds of layers have; subclasses say how the parts are put together."""

    def __init__(self, config: GPTConfig, index: int) -> None:
        super().__init__()
        scale = config.score_scale / (index + 1 if config.scale_qk_dot_by_layer_idx else 1)
        # A router weighs what the norm returns in float32.
        normed = norm if config.moe.is_on else norm_of_inputs
        self.norm1 = normed(config)
        self.self_attn = CausalSelfAttention(config, scale)
        self.norm3 = normed(config) if config.has_untied_norm else None
        self.ffn = Experts(config) if config.moe.is_on else _feed_forward(config)
        self.norm1_post = norm(config) if config.norm_first_sandwich else nn.Identity()
        self.norm3_post = norm(config) if config.norm_first_sandwich else nn.Identity()
        self.dropout = nn.Dropout(config.dropout_rate)
        self.is_windowed = is_windowed(config, index)

    def attend(self, hidden: Tensor, context: SequenceContext) -> Tensor:
        """The attention part of normed hidden states."""
        mask = context.windowed_mask if self.is_windowed else context.mask
        return self.dropout(self.norm1_post(self.self_attn(hidden, context.rotation, mask)))

    def feed(self, hidden: Tensor, input_ids: Tensor, routings: list[Routing]) -> Tensor:
        """The feed-forward part of normed hidden states."""
        if isinstance(self.ffn, Experts):
            hidden, routing = self.ffn(hidden, input_ids)
            routings.append(routing)
        else:
            hidden = self.ffn(hidden)
        return self.dropout(self.norm3_post(hidden))


class DecoderLayer(_Layer):
    """x + attention(norm1(x)), then x + ffn(norm3(x)); in a sandwich, the parts are normed once more."""

    def forward(
        self, hidden: Tensor, input_ids: Tensor, context: SequenceContext, routings: list[Routing]
    ) -> Tensor:
        """[batch, sequence, hidden] to the same shape."""
        assert self.norm3 is not None
        hidden = plus(hidden, self.attend(self.norm1(hidden), context))
        return plus(hidden, self.feed(self.norm3(hidden), input_ids, routings))


class ParallelDecoderLayer(_Layer):
    """x + attention(norm1(x)) + ffn(norm1(x)), or ffn(norm3(x)) with norms of their own.

    Reference:
        Wang and Komatsuzaki, GPT-J-6B, 2021.
    """

    def forward(
        self, hidden: Tensor, input_ids: Tensor, context: SequenceContext, routings: list[Routing]
    ) -> Tensor:
        """[batch, sequence, hidden] to the same shape."""
        normed = self.norm1(hidden)
        other = normed if self.norm3 is None else self.norm3(hidden)
        fed = plus(hidden, self.feed(other, input_ids, routings))
        return plus(fed, self.attend(normed, context))


def _feed_forward(config: GPTConfig) -> FeedForward:
    return FeedForward(config.hidden_size, config.filter_size, config.use_ffn_bias, config.nonlinearity)


def is_windowed(config: GPTConfig, index: int) -> bool:
    """Whether a layer sees a window of what came before it.

    Args:
        config: of the model.
        index: of the layer, from 0.

    Example:
        >>> [is_windowed(GPTConfig(attention_sliding_window_length=size), 0) for size in (None, 8)]
        [False, True]
    """
    if not config.sliding_window_every_other_decoder_layer:
        return config.attention_sliding_window_length is not None
    first = config.sliding_window_every_other_decoder_layer_pattern == "sliding_window_first"
    return first == (index % 2 == 0)


def norm(config: GPTConfig) -> nn.Module:
    """A normalisation of hidden states as the config names it.

    Example:
        >>> norm(GPTConfig(norm_type="rmsnorm", hidden_size=8, num_heads=2))
        RMSNorm((8,), eps=1e-05, elementwise_affine=True)

    Reference:
        Ba et al., arXiv 1607.06450; Zhang and Sennrich, arXiv 1910.07467 (rmsnorm).
    """
    size = config.hidden_size
    epsilon = config.layer_norm_epsilon
    if config.norm_type == "rmsnorm":
        return nn.RMSNorm(size, epsilon)
    if config.norm_type == "biasless-layernorm":
        return nn.LayerNorm(size, epsilon, bias=False)
    return nn.LayerNorm(size, epsilon, elementwise_affine=config.norm_type == "layernorm")


def norm_of_inputs(config: GPTConfig) -> nn.Module:
    """The same, before linear layers alone: under autocast its result may have the dtype of their products.

    Example:
        >>> isinstance(norm_of_inputs(GPTConfig(hidden_size=8, num_heads=2)), LayerNorm)
        True
    """
    made = norm(config)
    if isinstance(made, nn.LayerNorm):
        made.__class__ = LayerNorm
    return made


class LayerNorm(nn.LayerNorm):
    """As torch's, but for the dtype of its result under autocast to bfloat16: see `norm_for_products`."""

    def forward(self, input: Tensor) -> Tensor:
        """[..., size] to the same shape."""
        if not torch.jit.is_tracing() and input.shape[-1:] != self.normalized_shape:
            return super().forward(input)  # which refuses it
        return norm_for_products(input, self.weight, self.bias, self.eps)
