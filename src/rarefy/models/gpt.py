"""The pre-LN GPT decoder with the configuration keys and the parameter names of the Model Zoo."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from rarefy.errors import ConfigError
from rarefy.models.attention import causal_attention
from rarefy.models.language_modeling import (
    LanguageModelLoss,
    LanguageModelMetrics,
    LanguageModelOutput,
    LossScaling,
    check_shapes,
    check_token_ids,
)

Size = Annotated[int, Field(ge=1, description="a whole number ≥ 1")]
Rate = Annotated[float, Field(ge=0, lt=1, allow_inf_nan=False, description="a rate from 0 to below 1")]
Finite = Annotated[float, Field(allow_inf_nan=False, description="a number")]
Positive = Annotated[Finite, Field(gt=0, description="a number above 0")]
Switch = Annotated[bool, Field(description="true or false")]


class InitializerConfig(BaseModel):
    """A normal distribution cut off at `a` and `b`; by default at two standard deviations from the mean."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: Literal["truncated_normal"] = "truncated_normal"
    mean: Finite = 0.0
    std: Positive = 0.02
    a: Finite | None = None
    b: Finite | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value that may be drawn."""
        low = self.mean - 2 * self.std if self.a is None else self.a
        return low, self.mean + 2 * self.std if self.b is None else self.b

    def fill_(self, weight: Tensor) -> None:
        """Draws every entry of `weight` in place, from torch's global generator."""
        nn.init.trunc_normal_(weight, self.mean, self.std, *self.bounds)


Initializer = Annotated[
    InitializerConfig | None,
    Field(
        description="a truncated normal distribution: name, mean, std > 0, a, b",
        examples=["{name: truncated_normal, std: 0.02}"],
    ),
]


class GPTConfig(BaseModel):
    """Every key of the `gpt2` and `gpt3` models; any other key is refused.

    `mixed_precision` and `fp16_type` are accepted for the sake of Model Zoo files and have no effect: the
    trainer's `precision` decides. `loss_weight` counts with `loss_scaling: batch_size` only.

    Example:
        >>> GPTConfig(hidden_size=64, num_heads=4).vocab_size
        50257
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    vocab_size: Size = 50257
    hidden_size: Size = 768
    max_position_embeddings: Size = 1024
    position_embedding_type: Annotated[Literal["learned"], Field(description="learned")] = "learned"
    share_embedding_weights: Switch = True
    num_hidden_layers: Size = 12
    num_heads: Size = 12
    filter_size: Size = 3072
    dropout_rate: Rate = 0.1
    embedding_dropout_rate: Annotated[Rate | None, Field(description="a rate from 0 to below 1, or null")] = (
        None
    )
    attention_dropout_rate: Rate = 0.1
    layer_norm_epsilon: Positive = 1e-5
    attention_type: Annotated[Literal["scaled_dot_product"], Field(description="scaled_dot_product")] = (
        "scaled_dot_product"
    )
    nonlinearity: Annotated[Literal["gelu"], Field(description="gelu")] = "gelu"
    use_projection_bias_in_attention: Switch = True
    use_ffn_bias_in_attention: Switch = True
    use_ffn_bias: Switch = True
    use_bias_in_output: Switch = False
    initializer: Initializer = None
    embedding_initializer: Initializer = None
    output_layer_initializer: Initializer = None
    loss_scaling: Annotated[LossScaling, Field(description="num_tokens or batch_size")] = "num_tokens"
    loss_weight: Positive = 1.0
    mixed_precision: Switch | None = None
    fp16_type: Annotated[str | None, Field(description="a number format", examples=["cbfloat16"])] = None


class GPTModel(nn.Module):
    """A GPT decoder with its loss.

    In train mode `forward` returns the loss, in eval mode a `LanguageModelOutput` with the sums for the
    metrics. The parameters are drawn from torch's global generator.

    Args:
        config: sizes, rates, initialisers and the scaling of the loss.

    Raises:
        ConfigError: num_heads does not divide hidden_size, or an initialiser's `a` is not below its `b`.

    Example:
        >>> config = GPTConfig(vocab_size=9, hidden_size=8, num_heads=2, num_hidden_layers=1, filter_size=16)
        >>> model = GPTModel(config)
        >>> ids = torch.arange(6).reshape(2, 3)
        >>> model({"input_ids": ids, "labels": ids + 1}).ndim
        0

    Reference:
        Radford et al., Language Models are Unsupervised Multitask Learners, 2019;
        Brown et al., Language Models are Few-Shot Learners, arXiv 2005.14165.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.model = GPTDecoder(config)
        self.loss = LanguageModelLoss(config.loss_scaling, config.loss_weight)

    def forward(self, batch: Mapping[str, Tensor]) -> Tensor | LanguageModelOutput:
        """The loss of one batch; on the CPU out-of-range token ids are named in an error.

        Args:
            batch: `input_ids` and `labels` (already shifted by one), both [batch, sequence] of int32 or
                int64, and optionally the loss mask of that shape as `loss_mask` or `attention_mask`.

        Raises:
            ConfigError: as for `check_batch`.
        """
        check_shapes(batch, max_length=self.config.max_position_embeddings)
        if batch["input_ids"].device.type == "cpu" and not torch.compiler.is_compiling():
            check_token_ids(batch, self.config.vocab_size)
        logits = self.model(batch["input_ids"])
        return self.loss(logits, batch) if self.training else self.loss.detailed(logits, batch)

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Whether this model can run on a batch; reads the batch's values.

        Raises:
            ConfigError: a field is missing, a shape differs, a sequence is longer than
                max_position_embeddings, or a token id is outside the vocabulary.
        """
        check_shapes(batch, max_length=self.config.max_position_embeddings)
        check_token_ids(batch, self.config.vocab_size)

    def eval_metrics(self) -> LanguageModelMetrics:
        """A fresh accumulator of `eval/loss`, `eval/lm_perplexity` and `eval/accuracy`."""
        return LanguageModelMetrics(self.config.vocab_size)


class GPTDecoder(nn.Module):
    """Embeddings, decoder layers, final norm and the projection to the vocabulary.

    Args:
        config: as for `GPTModel`.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embedding_layer = EmbeddingLayer(config)
        self.transformer_decoder = TransformerDecoder(config)
        self.ln_f = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.use_bias_in_output)
        if config.share_embedding_weights:
            self.lm_head.weight = self.embedding_layer.word_embeddings.weight
        _initialize(self, config)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary] of the token after each of `input_ids` [batch, sequence]."""
        return self.lm_head(self.ln_f(self.transformer_decoder(self.embedding_layer(input_ids))))


class EmbeddingLayer(nn.Module):
    """Word embedding plus learned position embedding, then dropout."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = PositionEmbedding(config)
        rate = config.embedding_dropout_rate
        self.dropout = nn.Dropout(config.dropout_rate if rate is None else rate)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [batch, sequence, hidden]."""
        words = self.word_embeddings(input_ids)
        return self.dropout(words + self.position_embeddings(input_ids.shape[1]))


class PositionEmbedding(nn.Module):
    """One learned vector a position."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def forward(self, length: int) -> Tensor:
        """The vectors [length, hidden] of the first positions."""
        return self.embed(torch.arange(length, device=self.embed.weight.device))


class TransformerDecoder(nn.Module):
    """The stack of decoder layers."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        """Applies every layer to [batch, sequence, hidden]."""
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class DecoderLayer(nn.Module):
    """x + attention(norm1(x)), then x + ffn(norm3(x))."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.self_attn = CausalSelfAttention(config)
        self.norm3 = nn.LayerNorm(config.hidden_size, config.layer_norm_epsilon)
        self.ffn = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout_rate)

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] to the same shape."""
        hidden = hidden + self.dropout(self.self_attn(self.norm1(hidden)))
        return hidden + self.dropout(self.ffn(self.norm3(hidden)))


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which each position sees itself and what came before."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        size, bias = config.hidden_size, config.use_projection_bias_in_attention
        self.proj_q_dense_layer = nn.Linear(size, size, bias=bias)
        self.proj_k_dense_layer = nn.Linear(size, size, bias=bias)
        self.proj_v_dense_layer = nn.Linear(size, size, bias=bias)
        self.proj_output_dense_layer = nn.Linear(size, size, bias=config.use_ffn_bias_in_attention)
        self.num_heads, self.dropout_rate = config.num_heads, config.attention_dropout_rate

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] to the same shape."""
        projections = (self.proj_q_dense_layer, self.proj_k_dense_layer, self.proj_v_dense_layer)
        query, key, value = (self._split_heads(project(hidden)) for project in projections)
        rate = self.dropout_rate if self.training else 0.0
        return self.proj_output_dense_layer(causal_attention(query, key, value, rate).flatten(2))

    def _split_heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(2, (self.num_heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with an exact GELU in between."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        narrow, wide, bias = config.hidden_size, config.filter_size, config.use_ffn_bias
        self.ffn = nn.Sequential(DenseLayer(narrow, wide, bias, nn.GELU()), DenseLayer(wide, narrow, bias))

    def forward(self, hidden: Tensor) -> Tensor:
        """[batch, sequence, hidden] to the same shape."""
        return self.ffn(hidden)


class DenseLayer(nn.Module):
    """A linear layer and, where given, an activation."""

    def __init__(self, inputs: int, outputs: int, bias: bool, activation: nn.Module | None = None) -> None:
        super().__init__()
        self.linear_layer = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation or nn.Identity()

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., inputs] to [..., outputs]."""
        return self.activation(self.linear_layer(hidden))


def _check(config: GPTConfig) -> None:
    if config.hidden_size % config.num_heads:
        allowed = f"a divisor of hidden_size ({config.hidden_size})"
        raise ConfigError("num_heads", config.num_heads, allowed)
    for name in ("initializer", "embedding_initializer", "output_layer_initializer"):
        given: InitializerConfig | None = getattr(config, name)
        if given and given.bounds[0] >= given.bounds[1]:
            low, high = given.bounds
            raise ConfigError(name, f"the interval from {low} to {high}", "bounds a < b", "a: -0.04, b: 0.04")


def _initialize(decoder: GPTDecoder, config: GPTConfig) -> None:
    plain = config.initializer or InitializerConfig()
    embedding = config.embedding_initializer or InitializerConfig()
    scaled = InitializerConfig(std=0.02 / math.sqrt(2 * config.num_hidden_layers))
    output = config.output_layer_initializer or scaled
    outputs = ("proj_output_dense_layer", "ffn.ffn.1.linear_layer")
    for name, module in decoder.named_modules():
        if isinstance(module, nn.Embedding):
            embedding.fill_(module.weight)
        elif isinstance(module, nn.Linear):
            if name != "lm_head" or not config.share_embedding_weights:
                (output if name.endswith(outputs) else plain).fill_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
