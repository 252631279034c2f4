"""The decoder with the configuration keys and the parameter names of the Model Zoo."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from rarefy.decoder.attention import SequenceContext, mask_of
from rarefy.decoder.config_check import check_config
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.embedding import EmbeddingLayer
from rarefy.decoder.experts import Routing, balance_loss
from rarefy.decoder.feed_forward import GATES
from rarefy.decoder.initialization import initialize
from rarefy.decoder.layers import TransformerDecoder, norm, norm_of_inputs
from rarefy.decoder.rotary import Rotary
from rarefy.models.language_modeling import (
    SHARE_OF_SAMPLES,
    LanguageModelLoss,
    LanguageModelMetrics,
    LanguageModelOutput,
    check_shapes,
    check_token_ids,
    loss_mask,
)

_FLOAT32 = 4
_MASK = 1
# Numbers that the loss keeps or works in for each entry of the vocabulary: logits, their logarithms, two gradients.
_COPIES_OF_LOGITS = 4


def activation_bytes(config: GPTConfig, samples: int, length: int, number_bytes: int = _FLOAT32) -> int:
    """Bytes that a forward pass keeps for the backward pass, and what the loss works in; within a third or so.

    Counted are a layer's norms, projections, attention and feed-forward part, and the logits. Scores of attention count
    where torch keeps them: with attention dropout or alibi, or capped.

    Args:
        config: of the decoder.
        samples: in the batch.
        length: of a sequence.
        number_bytes: of an activation: 4, or 2 under autocast.

    Returns:
        Bytes.

    Example:
        >>> round(activation_bytes(GPTConfig(), 256, 2048) / 2**30)
        1986
    """
    tokens = samples * length
    layer = tokens * (_kept_numbers(config) * number_bytes + _kept_masks(config))
    layer += tokens * length * config.num_heads * _score_bytes(config, number_bytes)
    logits = tokens * config.vocab_size * _COPIES_OF_LOGITS * _FLOAT32
    return config.num_hidden_layers * layer + logits


def _kept_numbers(config: GPTConfig) -> int:
    """Numbers a token that a layer keeps."""
    norms = 4 if config.has_untied_norm else 2
    norms += 2 if config.norm_first_sandwich else 0
    # Keys and values are repeated where several heads share them.
    attention = 4 * config.inner_size
    wide = 4 if config.nonlinearity in GATES else 2
    experts = config.moe.top_k + (config.moe.num_shared_experts or 0) if config.moe.is_on else 1
    # Each expert keeps its tokens as well.
    copies = 2 * config.hidden_size * experts if config.moe.is_on else 0
    return norms * config.hidden_size + attention + wide * config.filter_size * experts + copies


def _kept_masks(config: GPTConfig) -> int:
    return 2 * config.hidden_size * _MASK if config.dropout_rate else 0


def _score_bytes(config: GPTConfig, number_bytes: int) -> int:
    rate = config.attention_dropout_rate
    has_dropout = bool(config.dropout_rate if rate is None else rate)
    capped = 2 * number_bytes if config.attention_logit_softcapping is not None else 0
    if has_dropout:
        # The weights before and after dropout, and its mask.
        return capped + 2 * number_bytes + _MASK
    return capped + (number_bytes if capped or config.position_embedding_type == "alibi" else 0)


def _one(config: GPTConfig) -> float:
    return 1.0


def _by_hidden_width(config: GPTConfig) -> float:
    return 1 / config.hidden_width


def _by_filter_width(config: GPTConfig) -> float:
    return 1 / config.filter_width


# The first group that a parameter is in decides.
_RATE_GROUPS: Mapping[str, tuple[tuple[str, ...], Callable[[GPTConfig], float]]] = MappingProxyType(
    {
        "embedding": (("*embedding*weight",), _one),
        "decoder_kernel": (
            ("*decoder*dense*weight", "*decoder*linear*weight", "*decoder*linear*expert_weights"),
            _one,
        ),
        "decoder_attention": (("*decoder*attn*dense*weight",), _by_hidden_width),
        "decoder_input_ffn": (
            ("*decoder*ffn*.0.linear*weight", "*decoder*ffn*.0.linear*expert_weights"),
            _by_hidden_width,
        ),
        "decoder_output_ffn": (
            ("*decoder*ffn*.1.linear*weight", "*decoder*ffn*.1.linear*expert_weights"),
            _by_filter_width,
        ),
    }
)


class GPTModel(nn.Module):
    """A decoder with its loss.

    In train mode `forward` returns the loss, in eval mode a `LanguageModelOutput` with the sums for the
    metrics. The parameters are drawn from torch's global generator.

    Args:
        config: sizes, kinds of layers, rates, initialisers and the scaling of the loss.

    Raises:
        ConfigError: keys that do not go together: num_heads that does not divide hidden_size, say.

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
        check_config(config)
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
        # On a GPU the check would wait for it, and in a compiled graph it cannot read values.
        if batch["input_ids"].device.type == "cpu" and not torch.compiler.is_compiling():
            check_token_ids(batch, self.config.vocab_size)
        routings: list[Routing] = []
        logits = self.model(batch["input_ids"], routings)
        if not self.training:
            return self.loss.detailed(logits, batch)
        coefficient = self.config.moe.load_balancing_loss_coef
        loss = self.loss(logits, batch)
        if not coefficient or not routings:
            return loss
        # The balance is a mean over samples, so a part of a batch counts by how many of them it has.
        share = batch.get(SHARE_OF_SAMPLES, 1.0)
        return loss + coefficient * share * balance_loss(routings, loss_mask(batch))

    def check_batch(self, batch: Mapping[str, Tensor]) -> None:
        """Whether this model can run on a batch; reads the batch's values.

        Raises:
            ConfigError: a field is missing, a shape differs, a sequence is longer than
                max_position_embeddings, or a token id is outside the vocabulary.
        """
        check_shapes(batch, max_length=self.config.max_position_embeddings)
        check_token_ids(batch, self.config.vocab_size)

    def parts_of(self, batch: Mapping[str, Tensor], size: int) -> Iterator[dict[str, Tensor]]:
        """A batch in parts of at most `size` samples, whose losses and gradients add up to those of the whole."""
        return self.loss.parts_of(batch, size)

    def activation_bytes(self, samples: int, length: int, number_bytes: int = 4) -> int:
        """Memory that a training step takes for activations, roughly; see `activation_bytes`."""
        return activation_bytes(self.config, samples, length, number_bytes)

    def learning_rate_groups(self) -> dict[str, tuple[tuple[str, ...], float]]:
        """Groups of parameters by their Model Zoo names, with the factors of their learning rates under muP."""
        return {name: (globs, scale_of(self.config)) for name, (globs, scale_of) in _RATE_GROUPS.items()}

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
        self.config = config
        self.embedding_layer = EmbeddingLayer(config)
        if config.embedding_layer_norm:
            self.embedding_ln_f = norm(config)
        self.transformer_decoder = TransformerDecoder(config)
        self.ln_f = norm_of_inputs(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=config.use_bias_in_output)
        # Before weights are drawn, so that the shared one is drawn once.
        if config.share_embedding_weights:
            self.lm_head.weight = self.embedding_layer.word_embeddings.weight
        self.rotary = Rotary(config) if config.position_embedding_type == "rotary" else None
        initialize(self, config)

    def forward(self, input_ids: Tensor, routings: list[Routing] | None = None) -> Tensor:
        """Logits [batch, sequence, vocabulary] of the token after each of `input_ids` [batch, sequence].

        Args:
            input_ids: of int32 or int64.
            routings: gets where each layer sent the tokens, in models with experts.
        """
        hidden = self._embed(input_ids)
        context = self._context(input_ids.shape[1], hidden.device)
        hidden = self.transformer_decoder(hidden, input_ids, context, [] if routings is None else routings)
        logits = self.lm_head(self.ln_f(hidden))
        if self.config.logits_scale != 1.0:
            logits = logits * self.config.logits_scale
        cap = self.config.final_logit_softcapping
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _embed(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding_layer(input_ids)
        if self.config.embedding_layer_norm:
            hidden = self.embedding_ln_f(hidden)
        if self.config.embeddings_scale not in (None, 1.0):
            hidden = hidden * self.config.embeddings_scale
        return self.embedding_layer.dropout(hidden)

    def _context(self, length: int, device: torch.device) -> SequenceContext:
        """What the layers need to know of the positions."""
        config = self.config
        rotation = None if self.rotary is None else self.rotary.rotation(length, device)
        alibi = self.embedding_layer.position_embed_helper
        bias = None if alibi is None else alibi(length)
        window = config.attention_sliding_window_length
        # Once for all layers, which are of two kinds at the most.
        mask = mask_of(length, None, 0, bias, device)
        windowed = mask if window is None else mask_of(length, window, config.sinks, bias, device)
        return SequenceContext(rotation, mask, windowed)
