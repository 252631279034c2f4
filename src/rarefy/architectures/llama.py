"""Llama and Mistral: rotary positions, rmsnorm, gated units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rarefy.architectures.architecture import (
    Architecture,
    Options,
    Row,
    attention_rate,
    leaves,
    same,
    without,
)
from rarefy.architectures.nonlinearities import GATED, gated_named
from rarefy.architectures.rope import halves, rope_keys, rope_misfits, rope_options
from rarefy.decoder.decoder_config import GPTConfig

SIZES: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "hidden_size": "hidden_size",
        "intermediate_size": "filter_size",
        "num_hidden_layers": "num_hidden_layers",
        "num_attention_heads": "num_heads",
        "max_position_embeddings": "max_position_embeddings",
        "rms_norm_eps": "layer_norm_epsilon",
        "tie_word_embeddings": "share_embedding_weights",
    }
)
# What all models of this family share; the rest of a model's table adds to it.
ALLOWED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "is_parallel": (False,),
        "position_embedding_type": ("rotary",),
        "norm_type": ("rmsnorm",),
        "nonlinearity": tuple(GATED),
        "embedding_layer_norm": (False,),
        "norm_first_sandwich": (False,),
        "sliding_window_every_other_decoder_layer": (False,),
        "attention_sliding_window_length": (None,),
        "attention_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "use_ffn_bias_in_attention": (False,),
        "use_projection_bias_in_attention": (False,),
        "use_ffn_bias": (False,),
        "use_bias_in_output": (False,),
    }
)
BIASES = ("use_projection_bias_in_attention", "use_ffn_bias_in_attention", "use_ffn_bias")
NORMS: Mapping[str, str] = MappingProxyType({"input_layernorm": "norm1", "post_attention_layernorm": "norm3"})
MLP: Mapping[str, str] = MappingProxyType(
    {
        "up_proj": "ffn.ffn.0.linear_layer",
        "gate_proj": "ffn.ffn.0.linear_layer_for_glu",
        "down_proj": "ffn.ffn.1.linear_layer",
    }
)
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
    }
)


def attention_options(config: GPTConfig) -> dict[str, Any]:
    """Heads, positions and dropout of attention, and no special tokens, which are a tokenizer's."""
    return {
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "attention_dropout": attention_rate(config),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        **rope_options(config),
    }


def attention_keys(options: Options) -> dict[str, Any]:
    """The decoder's keys for `attention_options`, for the whole family's norms, and for no biases."""
    heads = options["num_attention_heads"]
    groups = options.get("num_key_value_heads") or heads
    # Older files have no `head_dim`, and newer ones may have one that is not hidden size / heads.
    size = options.get("head_dim") or options["hidden_size"] // heads
    biases = dict.fromkeys(("use_projection_bias_in_attention", "use_ffn_bias_in_attention"), False)
    keys = {
        "position_embedding_type": "rotary",
        "rotary_dim": size,
        "rotary_pairs": "halves",
        "norm_type": "rmsnorm",
        "attention_module": "multiquery_attention",
        "extra_attention_params": {"num_kv_groups": groups},
        "attention_dropout_rate": float(options["attention_dropout"]),
        "dropout_rate": 0.0,
        "use_ffn_bias": False,
        **biases,
        **rope_keys(options),
    }
    return keys if size * heads == options["hidden_size"] else keys | {"attention_inner_dim": size * heads}


def whole_heads_turn(config: GPTConfig) -> Iterator[str]:
    """Positions that turn a part of a head only, and kinds of scaling that Transformers lacks."""
    if config.position_embedding_type == "rotary" and config.rotary_size != config.head_size:
        yield f"rotary_dim: {config.rotary_size} (a head has {config.head_size})"
    yield from rope_misfits(config)


def no_experts(config: GPTConfig) -> Iterator[str]:
    """A mixture of experts."""
    if config.moe.is_on:
        yield f"moe.num_experts: {config.moe.num_experts}"


def outer(config: GPTConfig) -> list[Row]:
    """Embeddings, final norm, and the output layer where it has weights of its own."""
    names = {"model.embed_tokens": "embedding_layer.word_embeddings", "model.norm": "ln_f"}
    if not config.share_embedding_weights:
        names |= {"lm_head": "lm_head"}
    return same(names, leaves(False))


def attention_rows(config: GPTConfig, has_bias: bool = False) -> list[Row]:
    """The four projections of attention."""
    turned = {"self_attn.q_proj": ("q", config.num_heads), "self_attn.k_proj": ("k", config.key_heads)}
    kept = leaves(has_bias)
    rows = [
        row
        for there, (name, heads) in turned.items()
        for row in same({there: f"self_attn.proj_{name}_dense_layer"}, kept, halves(config, heads))
    ]
    # Only queries and keys are turned by position, so only their rows may be in another order.
    plain = {
        "self_attn.v_proj": "self_attn.proj_v_dense_layer",
        "self_attn.o_proj": "self_attn.proj_output_dense_layer",
    }
    return rows + same(plain, kept)


def has_attention_bias(config: GPTConfig) -> bool:
    """Whether some projection of attention has a bias; the others then get one of zeros."""
    return config.use_projection_bias_in_attention or config.use_ffn_bias_in_attention


def _misfits(config: GPTConfig) -> Iterator[str]:
    yield from whole_heads_turn(config)
    yield from no_experts(config)


def _llama_options(config: GPTConfig) -> dict[str, Any]:
    biases = {"attention_bias": has_attention_bias(config), "mlp_bias": config.use_ffn_bias}
    return {"hidden_act": GATED[config.nonlinearity], **attention_options(config), **biases}


def _llama_keys(options: Options) -> dict[str, Any]:
    in_attention = bool(options.get("attention_bias"))
    return attention_keys(options) | {
        "nonlinearity": gated_named(options["hidden_act"]),
        "use_projection_bias_in_attention": in_attention,
        "use_ffn_bias_in_attention": in_attention,
        "use_ffn_bias": bool(options.get("mlp_bias")),
    }


def _llama_rows(config: GPTConfig) -> list[Row]:
    mlp = {f"mlp.{there}": here for there, here in MLP.items()}
    return [
        *same(NORMS, leaves(False)),
        *attention_rows(config, has_attention_bias(config)),
        *same(mlp, leaves(config.use_ffn_bias)),
    ]


LLAMA = Architecture(
    model_type="llama",
    model_class="LlamaForCausalLM",
    model="llama",
    allowed=without(ALLOWED, *BIASES),
    sizes=SIZES,
    defaults=DEFAULTS,
    options=_llama_options,
    keys=_llama_keys,
    outer=outer,
    inner=_llama_rows,
    layers="model.layers.{}.",
    misfits=_misfits,
    ignored=("rotary_emb.inv_freq",),
)


def _window(options: Options) -> dict[str, Any]:
    window = options.get("sliding_window")
    return {} if window is None else {"attention_sliding_window_length": window}


def mistral_options(config: GPTConfig) -> dict[str, Any]:
    """Options of Mistral, which Mixtral adds to."""
    window = {"sliding_window": config.attention_sliding_window_length}
    return {"hidden_act": GATED[config.nonlinearity], **attention_options(config), **window}


def mistral_keys(options: Options) -> dict[str, Any]:
    """The decoder's keys for the options of Mistral."""
    return attention_keys(options) | {"nonlinearity": gated_named(options["hidden_act"])} | _window(options)


MISTRAL = Architecture(
    model_type="mistral",
    model_class="MistralForCausalLM",
    model="mistral",
    allowed=without(ALLOWED, "attention_sliding_window_length"),
    sizes=SIZES,
    # Transformers' own default of the window is 4096 and not null.
    defaults={
        **DEFAULTS,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "max_position_embeddings": 131072,
    },
    options=mistral_options,
    keys=mistral_keys,
    outer=outer,
    inner=_llama_rows,
    layers="model.layers.{}.",
    misfits=_misfits,
    ignored=("rotary_emb.inv_freq",),
)
