"""How much memory a training step of a decoder takes for activations, from its keys alone."""

from __future__ import annotations

from rarefy.decoder.activations import GATES
from rarefy.decoder.decoder_config import GPTConfig

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
