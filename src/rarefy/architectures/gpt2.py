"""GPT-2 and GPTBigCode: learned positions, layer norms, biases everywhere."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rarefy.architectures.architecture import Architecture, Options, Row, attention_rate, joined, leaves, same
from rarefy.architectures.changes import SAME, Chain, Change, Joined, Transposed
from rarefy.architectures.llama import no_experts
from rarefy.architectures.nonlinearities import PLAIN, plain_named
from rarefy.decoder.decoder_config import GPTConfig

LAYER_NORMS = ("layernorm", "biasless-layernorm", "nonparametric-layernorm")
# What no architecture of this file or of the older ones with layer norms can do.
PLAIN_ATTENTION: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        "norm_type": LAYER_NORMS,
        "nonlinearity": tuple(PLAIN),
        "norm_first_sandwich": (False,),
        "attention_sliding_window_length": (None,),
        "attention_logit_softcapping": (None,),
        "final_logit_softcapping": (None,),
        "attention_inner_dim": (None,),
    }
)
SIZES: Mapping[str, str] = MappingProxyType(
    {
        "vocab_size": "vocab_size",
        "n_positions": "max_position_embeddings",
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_heads",
        "layer_norm_epsilon": "layer_norm_epsilon",
        "tie_word_embeddings": "share_embedding_weights",
    }
)
DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "resid_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "attn_pdrop": 0.1,
        "scale_attn_weights": True,
    }
)
NAMES: Mapping[str, str] = MappingProxyType(
    {"mlp.c_fc": "ffn.ffn.0.linear_layer", "mlp.c_proj": "ffn.ffn.1.linear_layer"}
)
_ALLOWED: Mapping[str, tuple[Any, ...]] = MappingProxyType(
    {
        **PLAIN_ATTENTION,
        "is_parallel": (False,),
        "position_embedding_type": ("learned",),
        "embedding_layer_norm": (False,),
        "use_bias_in_output": (False,),
    }
)
GPT2_VOCABULARY = 50257


def dropout_options(config: GPTConfig) -> dict[str, Any]:
    """The nonlinearity, the width of the feed-forward part and the three dropout rates."""
    rate = config.embedding_dropout_rate
    # Special tokens are a tokenizer's; GPT-2's own is known by its size, and ends a text with its last token.
    last = GPT2_VOCABULARY - 1 if config.vocab_size == GPT2_VOCABULARY else None
    return {
        "n_inner": config.filter_size,
        "activation_function": PLAIN[config.nonlinearity],
        "resid_pdrop": config.dropout_rate,
        "embd_pdrop": config.dropout_rate if rate is None else rate,
        "attn_pdrop": attention_rate(config),
        "bos_token_id": last,
        "eos_token_id": last,
    }


def dropout_keys(options: Options) -> dict[str, Any]:
    """The decoder's keys for `dropout_options`."""
    return {
        "filter_size": options.get("n_inner") or 4 * options["n_embd"],
        "nonlinearity": plain_named(options["activation_function"]),
        "dropout_rate": float(options["resid_pdrop"]),
        "embedding_dropout_rate": float(options["embd_pdrop"]),
        "attention_dropout_rate": float(options["attn_pdrop"]),
    }


def keys_for_each_head(config: GPTConfig) -> Iterator[str]:
    """Heads that share their keys."""
    if config.key_heads != config.num_heads:
        yield f"extra_attention_params.num_kv_groups: {config.key_heads}"


def _keys(options: Options) -> dict[str, Any]:
    by_layer = bool(options.get("scale_attn_by_inverse_layer_idx"))
    return {
        **dropout_keys(options),
        "attention_type": "scaled_dot_product" if options["scale_attn_weights"] else "dot_product",
        "scale_qk_dot_by_layer_idx": by_layer,
    }


def _outer(config: GPTConfig) -> list[Row]:
    embeddings = {
        "transformer.wte": "embedding_layer.word_embeddings",
        "transformer.wpe": "embedding_layer.position_embeddings.embed",
    }
    if not config.share_embedding_weights:
        embeddings |= {"lm_head": "lm_head"}
    return [*same(embeddings, leaves(False)), *same({"transformer.ln_f": "ln_f"})]


def _rows(config: GPTConfig, attention: Change, matrices: Change) -> list[Row]:
    attended = {"attn.c_proj": "self_attn.proj_output_dense_layer"}
    return [
        *same({"ln_1": "norm1", "ln_2": "norm3"}),
        *joined("attn.c_attn", attention),
        *same({**attended, **NAMES}, change=matrices),
    ]


def _gpt2_rows(config: GPTConfig) -> list[Row]:
    whole = Joined(1, (config.hidden_size,) * 3)
    # A `Conv1D` there is a linear layer whose weight is [in, out].
    return _rows(config, Chain((whole, Transposed())), Transposed())


def _gpt2_misfits(config: GPTConfig) -> Iterator[str]:
    yield from no_experts(config)
    yield from keys_for_each_head(config)


GPT2 = Architecture(
    model_type="gpt2",
    model_class="GPT2LMHeadModel",
    model="gpt2",
    allowed=_ALLOWED,
    sizes=SIZES,
    defaults={**DEFAULTS, "activation_function": "gelu_new"},
    options=dropout_options,
    keys=_keys,
    outer=_outer,
    inner=_gpt2_rows,
    layers="transformer.h.{}.",
    misfits=_gpt2_misfits,
    ignored=(".attn.bias", ".attn.masked_bias"),
)


def _big_code_misfits(config: GPTConfig) -> Iterator[str]:
    yield from no_experts(config)
    if config.key_heads not in (1, config.num_heads):
        yield f"extra_attention_params.num_kv_groups: {config.key_heads}"


def _big_code_options(config: GPTConfig) -> dict[str, Any]:
    return {**dropout_options(config), "multi_query": config.key_heads == 1}


def _big_code_keys(options: Options) -> dict[str, Any]:
    shared = {"attention_module": "multiquery_attention", "extra_attention_params": {"num_kv_groups": 1}}
    return {**_keys(options), **(shared if options["multi_query"] else {})}


def _big_code_rows(config: GPTConfig) -> list[Row]:
    size = config.head_size
    one_key = config.key_heads == 1
    # With several keys GPTBigCode goes head by head, with one key all queries come first.
    kept = Joined(1, (config.hidden_size, size, size)) if one_key else Joined(config.num_heads, (size,) * 3)
    return _rows(config, kept, SAME)


GPT_BIG_CODE = Architecture(
    model_type="gpt_bigcode",
    model_class="GPTBigCodeForCausalLM",
    model="starcoder",
    allowed=_ALLOWED,
    sizes=SIZES,
    defaults={**DEFAULTS, "activation_function": "gelu_pytorch_tanh", "multi_query": True},
    options=_big_code_options,
    keys=_big_code_keys,
    outer=_outer,
    inner=_big_code_rows,
    layers="transformer.h.{}.",
    misfits=_big_code_misfits,
    ignored=(".attn.bias", ".attn.masked_bias"),
)
