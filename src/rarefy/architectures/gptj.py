"""GPT-J and Falcon: attention and feed-forward part side by side, rotary positions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rarefy.architectures.architecture import (
    Architecture,
    Options,
    Row,
    attention_rate,
    joined,
    leaves,
    same,
)
from rarefy.architectures.changes import SAME, Chain, Each, Joined
from rarefy.architectures.gpt2 import (
    DEFAULTS,
    PLAIN_ATTENTION,
    SIZES,
    dropout_keys,
    dropout_options,
    keys_for_each_head,
)
from rarefy.architectures.llama import BIASES, no_experts, whole_heads_turn
from rarefy.architectures.nonlinearities import PLAIN, plain_named
from rarefy.architectures.rope import halves, rope_keys, rope_options
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.errors import RarefyError

_ALLOWED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        **PLAIN_ATTENTION,
        "is_parallel": (True,),
        "position_embedding_type": ("rotary",),
        "embedding_layer_norm": (False,),
    }
)
# The base of the wave lengths, for which GPT-J has no option.
_PLAIN_WAVES = 10000.0


def _gptj_misfits(config: GPTConfig) -> Iterator[str]:
    yield from no_experts(config)
    yield from keys_for_each_head(config)
    if config.scaling_type != "linear":
        yield f"pos_scaling_type: {config.scaling_type}"
    if config.is_parallel and config.has_untied_norm:
        yield "use_untied_layer_norm: true"


def _gptj_options(config: GPTConfig) -> dict[str, Any]:
    return {**dropout_options(config), "rotary_dim": config.rotary_size}


def _gptj_keys(options: Options) -> dict[str, Any]:
    size = options["rotary_dim"]
    if size is None:
        raise RarefyError("config.json: rotary_dim: null is not allowed; give the size of a head")
    # GPT-J has no bias in attention, and one in all other layers, the output layer among them.
    off = dict.fromkeys(("use_projection_bias_in_attention", "use_ffn_bias_in_attention"), False)
    on = dict.fromkeys(("use_ffn_bias", "use_bias_in_output"), True)
    return {**dropout_keys(options), "rotary_dim": size, **off, **on}


def _gptj_outer(config: GPTConfig) -> list[Row]:
    # GPT-J keeps its output layer even where it is tied, because of the bias.
    kept = ("bias",) if config.share_embedding_weights else leaves(True)
    return [
        *same({"transformer.wte": "embedding_layer.word_embeddings"}, leaves(False)),
        *same({"transformer.ln_f": "ln_f"}),
        *same({"lm_head": "lm_head"}, kept),
    ]


def _gptj_rows(config: GPTConfig) -> list[Row]:
    projections = {f"attn.{name}_proj": f"self_attn.proj_{name}_dense_layer" for name in "qkv"}
    projections |= {"attn.out_proj": "self_attn.proj_output_dense_layer"}
    mlp = {"mlp.fc_in": "ffn.ffn.0.linear_layer", "mlp.fc_out": "ffn.ffn.1.linear_layer"}
    return [*same({"ln_1": "norm1"}), *same(projections, leaves(False)), *same(mlp)]


GPTJ = Architecture(
    model_type="gptj",
    model_class="GPTJForCausalLM",
    model="gptj",
    allowed={
        **_ALLOWED,
        "use_projection_bias_in_attention": (False,),
        "use_ffn_bias_in_attention": (False,),
        "rotary_pairs": ("adjacent",),
        "rope_theta": (_PLAIN_WAVES,),
        "pos_scaling_factor": (1.0,),
    },
    sizes=SIZES,
    defaults={
        **DEFAULTS,
        "n_positions": 2048,
        "rotary_dim": 64,
        "activation_function": "gelu_new",
        "tie_word_embeddings": False,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    options=_gptj_options,
    keys=_gptj_keys,
    outer=_gptj_outer,
    inner=_gptj_rows,
    layers="transformer.h.{}.",
    misfits=_gptj_misfits,
    # The causal mask, which older versions of Transformers saved.
    ignored=(".attn.bias", ".attn.masked_bias"),
)


def _has_bias(config: GPTConfig) -> bool:
    return any(getattr(config, key) for key in BIASES)


def _falcon_misfits(config: GPTConfig) -> Iterator[str]:
    yield from no_experts(config)
    yield from whole_heads_turn(config)


def _is_newer(config: GPTConfig) -> bool:
    """Whether it takes what `new_decoder_architecture` brought: groups of heads, and norms of their own."""
    return config.key_heads not in (1, config.num_heads) or config.has_untied_norm


def _falcon_options(config: GPTConfig) -> dict[str, Any]:
    return {
        "num_ln_in_parallel_attn": 2 if config.has_untied_norm else 1,
        "new_decoder_architecture": _is_newer(config),
        "multi_query": config.key_heads == 1,
        "num_kv_heads": config.key_heads,
        "parallel_attn": True,
        "alibi": False,
        "bias": _has_bias(config),
        "activation": PLAIN[config.nonlinearity],
        "ffn_hidden_size": config.filter_size,
        "hidden_dropout": config.dropout_rate,
        "attention_dropout": attention_rate(config),
        "bos_token_id": None,
        "eos_token_id": None,
        **rope_options(config),
    }


def _falcon_keys(options: Options) -> dict[str, Any]:
    newer = options["new_decoder_architecture"]
    if options["alibi"] or not (newer or options["parallel_attn"]):
        given = "alibi: true" if options["alibi"] else "parallel_attn: false"
        raise RarefyError(
            f"config.json: {given} is not allowed in a falcon; give one with rotary, parallel attention"
        )
    heads = options["num_attention_heads"]
    # `num_kv_heads` counts in the newer kind alone; the older ones have one key or as many as queries.
    groups = (options["num_kv_heads"] or heads) if newer else 1 if options["multi_query"] else heads
    # Left out, the newer kind has two norms, as Transformers fills in.
    norms = options["num_ln_in_parallel_attn"] or 2
    return {
        "filter_size": options["ffn_hidden_size"] or 4 * options["hidden_size"],
        "nonlinearity": plain_named(options["activation"]),
        "rotary_dim": options["hidden_size"] // heads,
        "rotary_pairs": "halves",
        "attention_module": "multiquery_attention",
        "extra_attention_params": {"num_kv_groups": groups},
        "use_untied_layer_norm": bool(newer and norms == 2),
        "dropout_rate": float(options["hidden_dropout"]),
        "embedding_dropout_rate": 0.0,
        "attention_dropout_rate": float(options["attention_dropout"]),
        **dict.fromkeys(BIASES, bool(options["bias"])),
        **rope_keys(options),
    }


def _falcon_outer(config: GPTConfig) -> list[Row]:
    names = {"transformer.word_embeddings": "embedding_layer.word_embeddings"}
    if not config.share_embedding_weights:
        names |= {"lm_head": "lm_head"}
    return [*same(names, leaves(False)), *same({"transformer.ln_f": "ln_f"})]


def _falcon_rows(config: GPTConfig) -> list[Row]:
    groups = config.key_heads
    size = config.head_size
    turned = Each((halves(config, config.num_heads), halves(config, groups), SAME))
    grouped = Joined(groups, (config.num_heads // groups * size, size, size))
    norms = (
        {"ln_attn": "norm1", "ln_mlp": "norm3"} if config.has_untied_norm else {"input_layernorm": "norm1"}
    )
    linear = {
        "self_attention.dense": "self_attn.proj_output_dense_layer",
        "mlp.dense_h_to_4h": "ffn.ffn.0.linear_layer",
        "mlp.dense_4h_to_h": "ffn.ffn.1.linear_layer",
    }
    kept = leaves(_has_bias(config))
    attention = joined("self_attention.query_key_value", Chain((turned, grouped)), kept)
    return [*same(norms), *attention, *same(linear, kept)]


FALCON = Architecture(
    model_type="falcon",
    model_class="FalconForCausalLM",
    model="falcon",
    allowed={**_ALLOWED, "use_bias_in_output": (False,)},
    sizes=MappingProxyType(
        {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "num_hidden_layers": "num_hidden_layers",
            "num_attention_heads": "num_heads",
            "max_position_embeddings": "max_position_embeddings",
            "layer_norm_epsilon": "layer_norm_epsilon",
            "tie_word_embeddings": "share_embedding_weights",
        }
    ),
    defaults={
        "max_position_embeddings": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "new_decoder_architecture": False,
        "parallel_attn": True,
        "multi_query": True,
        "num_kv_heads": None,
        "num_ln_in_parallel_attn": None,
        "alibi": False,
        "bias": False,
        "activation": "gelu",
        "ffn_hidden_size": None,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    options=_falcon_options,
    keys=_falcon_keys,
    outer=_falcon_outer,
    inner=_falcon_rows,
    layers="transformer.h.{}.",
    misfits=_falcon_misfits,
    # Frequencies, which older versions of Transformers saved, and which follow from the options.
    ignored=("rotary_emb.inv_freq",),
)
