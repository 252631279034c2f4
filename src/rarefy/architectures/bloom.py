"""BLOOM: alibi, a norm after the embedding, and gelu by its tanh approximation."""

from __future__ import annotations

from collections.abc import Iterator
from types import MappingProxyType
from typing import Any

from rarefy.architectures.architecture import Architecture, Options, Row, attention_rate, joined, leaves, same
from rarefy.architectures.changes import Joined
from rarefy.architectures.gpt2 import PLAIN_ATTENTION, keys_for_each_head
from rarefy.architectures.llama import no_experts
from rarefy.decoder.decoder_config import GPTConfig
from rarefy.errors import RarefyError


def _misfits(config: GPTConfig) -> Iterator[str]:
    yield from no_experts(config)
    yield from keys_for_each_head(config)
    if config.filter_size != 4 * config.hidden_size:
        yield f"filter_size: {config.filter_size} (BLOOM has 4 · hidden_size)"


def _options(config: GPTConfig) -> dict[str, Any]:
    return {
        "hidden_dropout": config.dropout_rate,
        "attention_dropout": attention_rate(config),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _keys(options: Options) -> dict[str, Any]:
    if options["apply_residual_connection_post_layernorm"]:
        given = "apply_residual_connection_post_layernorm: true"
        raise RarefyError(f"config.json: {given} is not allowed; give a BLOOM with false")
    return {
        "filter_size": 4 * options["hidden_size"],
        "position_embedding_type": "alibi",
        "embedding_layer_norm": True,
        "nonlinearity": "gelu_new",
        "dropout_rate": float(options["hidden_dropout"]),
        "embedding_dropout_rate": 0.0,
        "attention_dropout_rate": float(options["attention_dropout"]),
    }


def _outer(config: GPTConfig) -> list[Row]:
    words = {"transformer.word_embeddings": "embedding_layer.word_embeddings"}
    if not config.share_embedding_weights:
        words |= {"lm_head": "lm_head"}
    norms = {"transformer.word_embeddings_layernorm": "embedding_ln_f", "transformer.ln_f": "ln_f"}
    return [*same(words, leaves(False)), *same(norms)]


def _inner(config: GPTConfig) -> list[Row]:
    names = {
        "input_layernorm": "norm1",
        "post_attention_layernorm": "norm3",
        "self_attention.dense": "self_attn.proj_output_dense_layer",
        "mlp.dense_h_to_4h": "ffn.ffn.0.linear_layer",
        "mlp.dense_4h_to_h": "ffn.ffn.1.linear_layer",
    }
    # Head by head: the query, the key and the value of the first, then those of the second.
    by_head = Joined(config.num_heads, (config.head_size,) * 3)
    return [*joined("self_attention.query_key_value", by_head), *same(names)]


BLOOM = Architecture(
    model_type="bloom",
    model_class="BloomForCausalLM",
    model="bloom",
    allowed={
        **PLAIN_ATTENTION,
        "is_parallel": (False,),
        "position_embedding_type": ("alibi",),
        "pos_scaling_factor": (1.0,),
        "alibi_trainable_slopes": (False,),
        "embedding_layer_norm": (True,),
        # Transformers has no other nonlinearity for it; the Model Zoo's `gelu` is the exact one.
        "nonlinearity": ("gelu_new", "gelu_fast"),
        "use_bias_in_output": (False,),
    },
    sizes=MappingProxyType(
        {
            "vocab_size": "vocab_size",
            "hidden_size": "hidden_size",
            "n_layer": "num_hidden_layers",
            "n_head": "num_heads",
            "seq_length": "max_position_embeddings",
            "layer_norm_epsilon": "layer_norm_epsilon",
            "tie_word_embeddings": "share_embedding_weights",
        }
    ),
    defaults={
        "seq_length": 2048,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
        "apply_residual_connection_post_layernorm": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    },
    options=_options,
    keys=_keys,
    outer=_outer,
    inner=_inner,
    layers="transformer.h.{}.",
    misfits=_misfits,
)
