"""Gemma 2: norms around every part, windows in every other layer, bounded scores and logits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rarefy.architectures.architecture import Architecture, Options, Row, leaves, same, without
from rarefy.architectures.changes import Plus
from rarefy.architectures.llama import (
    ALLOWED,
    DEFAULTS,
    MLP,
    SIZES,
    attention_keys,
    attention_options,
    attention_rows,
    has_attention_bias,
    no_experts,
    whole_heads_turn,
)
from rarefy.architectures.nonlinearities import GATED, gated_named
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.layers import is_windowed
from rarefy.errors import RarefyError

_NORMS: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm1_post",
        "pre_feedforward_layernorm": "norm3",
        "post_feedforward_layernorm": "norm3_post",
    }
)
_FREE = (
    "sliding_window_every_other_decoder_layer",
    "attention_sliding_window_length",
    "attention_logit_softcapping",
    "final_logit_softcapping",
    "use_projection_bias_in_attention",
    "use_ffn_bias_in_attention",
)
# Weights of norms are stored as their distance from 1.
_DISTANCE = Plus(-1.0)


def _misfits(config: GPTConfig) -> Iterator[str]:
    yield from whole_heads_turn(config)
    yield from no_experts(config)


def _kinds_of_layers(config: GPTConfig) -> list[str]:
    windowed = (is_windowed(config, index) for index in range(config.num_hidden_layers))
    return ["sliding_attention" if one else "full_attention" for one in windowed]


def _options(config: GPTConfig) -> dict[str, Any]:
    return {
        **attention_options(config),
        "hidden_activation": GATED[config.nonlinearity],
        "attention_bias": has_attention_bias(config),
        "query_pre_attn_scalar": config.head_size,
        # Transformers wants a number even where no layer has a window.
        "sliding_window": config.attention_sliding_window_length or config.max_position_embeddings,
        "layer_types": _kinds_of_layers(config),
        "attn_logit_softcapping": config.attention_logit_softcapping,
        "final_logit_softcapping": config.final_logit_softcapping,
    }


def _keys(options: Options) -> dict[str, Any]:
    size = options["head_dim"]
    biases = ("use_projection_bias_in_attention", "use_ffn_bias_in_attention")
    return {
        **attention_keys(options),
        **dict.fromkeys(biases, bool(options["attention_bias"])),
        **_window_keys(options),
        "norm_first_sandwich": True,
        "nonlinearity": gated_named(options.get("hidden_activation") or "gelu_pytorch_tanh"),
        # Gemma does so without an option.
        "embeddings_scale": math.sqrt(options["hidden_size"]),
        # The decoder divides scores by the root of the head's size, Gemma by the root of this option.
        "attention_logits_alpha": math.sqrt(size / options["query_pre_attn_scalar"]),
        "attention_logit_softcapping": options["attn_logit_softcapping"],
        "final_logit_softcapping": options["final_logit_softcapping"],
    }


def _window_keys(options: Options) -> dict[str, Any]:
    count = options["num_hidden_layers"]
    alternating = ["sliding_attention", "full_attention"] * count
    kinds = options.get("layer_types") or alternating[:count]
    window = options["sliding_window"]
    if window is None or set(kinds) == {"full_attention"}:
        return {}
    keys = {"attention_sliding_window_length": window}
    if set(kinds) == {"sliding_attention"} and count > 1:
        return keys
    for pattern, start in (("sliding_window_first", 0), ("full_attention_first", 1)):
        if kinds == alternating[start : start + count]:
            key = "sliding_window_every_other_decoder_layer"
            return {**keys, key: True, f"{key}_pattern": pattern}
    raise RarefyError(
        "config.json: these layer_types are not allowed; give alternating ones, or all of one kind"
    )


def _outer(config: GPTConfig) -> list[Row]:
    names = {"model.embed_tokens": "embedding_layer.word_embeddings"}
    if not config.share_embedding_weights:
        names |= {"lm_head": "lm_head"}
    return [*same(names, leaves(False)), *same({"model.norm": "ln_f"}, leaves(False), _DISTANCE)]


def _inner(config: GPTConfig) -> list[Row]:
    mlp = {f"mlp.{there}": here for there, here in MLP.items()}
    norms = same(_NORMS, leaves(False), _DISTANCE)
    return [*norms, *attention_rows(config, has_attention_bias(config)), *same(mlp, leaves(False))]


def _normalizer(config: GPTConfig) -> float:
    return math.sqrt(config.hidden_size)


GEMMA2 = Architecture(
    model_type="gemma2",
    model_class="Gemma2ForCausalLM",
    model="gemma2",
    allowed={**without(ALLOWED, *_FREE), "norm_first_sandwich": (True,)},
    sizes=SIZES,
    defaults={
        **DEFAULTS,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
        "head_dim": 256,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    options=_options,
    keys=_keys,
    outer=_outer,
    inner=_inner,
    layers="model.layers.{}.",
    misfits=_misfits,
    ignored=("rotary_emb.inv_freq",),
    embeddings_scale=_normalizer,
)
