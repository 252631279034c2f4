"""Factors that an architecture has no option for, multiplied into the weights beside them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.decoder.decoder_config import GPTConfig

_LAYER = "transformer_decoder.layers.{}."
_LINEAR = (".linear_layer", ".linear_layer_for_glu", "_dense_layer", "lm_head")
_NORMS = ("norm1", "norm3", "norm1_post", "norm3_post", "ln_f", "embedding_ln_f")


def whole_state(state: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """A decoder's tensors with every bias and every norm's weight that it might have: zeros, and ones.

    Args:
        state: of a `GPTDecoder`.
        config: of it.
    """
    whole = dict(state)
    for name, tensor in state.items():
        owner = name.rpartition(".")[0]
        if tensor.dim() == 2 and owner.endswith(_LINEAR):
            whole.setdefault(f"{owner}.bias", tensor.new_zeros(len(tensor)))
    like = next(iter(state.values()))
    for owner in _norms(config):
        whole.setdefault(f"{owner}.weight", like.new_ones(config.hidden_size))
        whole.setdefault(f"{owner}.bias", like.new_zeros(config.hidden_size))
    return whole


def _norms(config: GPTConfig) -> list[str]:
    inner = ["norm1", *(["norm3"] if config.has_untied_norm else [])]
    inner += ["norm1_post", "norm3_post"] if config.norm_first_sandwich else []
    layers = [_LAYER.format(index) + name for index in range(config.num_hidden_layers) for name in inner]
    return [*layers, "ln_f", *(["embedding_ln_f"] if config.embedding_layer_norm else [])]


def folded(
    state: Mapping[str, Tensor], config: GPTConfig, embeddings_scale: float = 1.0
) -> dict[str, Tensor]:
    """The whole state of a decoder that computes the same without muP's factors of embeddings, scores and logits.

    Queries take the factor of the scores, embeddings (or the norm after them) theirs, the final norm that of
    the logits. Where the output layer is tied to the embedding, the final norm takes the embedding's factor back.

    Args:
        state: of a `GPTDecoder`.
        config: of it; `embeddings_scale` is not 0.
        embeddings_scale: a factor of embeddings that stays, because the architecture has it.
    """
    whole = whole_state(state, config)
    embedding = (config.embeddings_scale or 1.0) / embeddings_scale
    logits = config.logits_scale
    # A bias takes the factor by itself; the weight beside it gets it through the final norm.
    _scale(whole, "lm_head.bias", logits)
    if config.embedding_layer_norm:
        _scale(whole, "embedding_ln_f.weight", embedding)
        _scale(whole, "embedding_ln_f.bias", embedding)
    else:
        for name in ("word_embeddings.weight", "position_embeddings.embed.weight", "position_embeddings.fpe"):
            _scale(whole, f"embedding_layer.{name}", embedding)
        # One tensor for both: what the embedding was multiplied by, the output layer has as well.
        if config.share_embedding_weights:
            logits /= embedding
    _scale(whole, "ln_f.weight", logits)
    _scale(whole, "ln_f.bias", logits)
    for index in range(config.num_hidden_layers):
        factor = config.score_scale * math.sqrt(config.head_size)
        if config.scale_qk_dot_by_layer_idx:
            factor /= index + 1
        for leaf in ("weight", "bias"):
            _scale(whole, f"{_LAYER.format(index)}self_attn.proj_q_dense_layer.{leaf}", factor)
    return whole


def _scale(state: dict[str, Tensor], name: str, factor: float) -> None:
    # A factor that rounding alone keeps from 1 would change every weight in its last digit.
    if name in state and not math.isclose(factor, 1.0, rel_tol=1e-12):
        # Not in place: these are the tensors of the model itself.
        state[name] = torch.mul(state[name], factor)
