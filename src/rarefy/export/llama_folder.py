"""The decoder as a `LlamaForCausalLM` or `MistralForCausalLM` of Transformers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from rarefy.decoder.decoder_config import GPTConfig
from rarefy.models.gpt import GPTModel

_KEYS: Mapping[str, Any] = MappingProxyType(
    {
        "position_embedding_type": "rotary",
        "norm_type": "rmsnorm",
        "nonlinearity": "swiglu",
        "is_parallel": False,
        "embedding_layer_norm": False,
        "norm_first_sandwich": False,
        "attention_logit_softcapping": None,
        "final_logit_softcapping": None,
        "sliding_window_every_other_decoder_layer": False,
        "embeddings_scale": 1.0,
        "scale_qk_dot_by_layer_idx": False,
        "use_projection_bias_in_attention": False,
        "use_ffn_bias_in_attention": False,
        "use_ffn_bias": False,
        "use_bias_in_output": False,
        "logits_scale": 1.0,
    }
)


def is_llama(config: GPTConfig) -> bool:
    """Whether Llama or Mistral compute the same as a decoder.

    Example:
        >>> is_llama(GPTConfig())
        False
    """
    has_keys = all(getattr(config, key) == value for key, value in _KEYS.items())
    is_plain = math.isclose(config.score_scale, config.head_size**-0.5) and not config.moe.is_on
    return has_keys and is_plain and config.rotary_size == config.head_size and _rope(config) is not None


def llama_of(model: GPTModel) -> nn.Module:
    """The same function as a model of Transformers; Mistral where attention has a window.

    Args:
        model: dense, and `is_llama`.

    Returns:
        The model in eval mode.
    """
    from transformers import (  # pyright: ignore[reportMissingImports]
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
    )

    options = _options(model.config)
    window = model.config.attention_sliding_window_length
    if window is None:
        converted = LlamaForCausalLM(LlamaConfig(**options))
    else:
        converted = MistralForCausalLM(MistralConfig(**options, sliding_window=window))
    converted.load_state_dict(_state(model))
    return converted.eval()


def _rope(config: GPTConfig) -> dict[str, Any] | None:
    """Transformers' options of the rotary positions; None where it has no counterpart."""
    theta = {"rope_theta": config.rope_theta}
    factor = config.pos_scaling_factor
    if config.scaling_type == "linear":
        return theta | (
            {"rope_type": "default"} if factor == 1.0 else {"rope_type": "linear", "factor": factor}
        )
    if config.scaling_type == "llama3":
        defaults = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        given = {**defaults, **(config.pos_scaling_extra_args or {})}
        return theta | {"rope_type": "llama3", "factor": factor, **given}
    return None


def _options(config: GPTConfig) -> dict[str, Any]:
    rate = config.attention_dropout_rate
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.filter_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.key_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.layer_norm_epsilon,
        "rope_parameters": _rope(config),
        "attention_dropout": config.dropout_rate if rate is None else rate,
        "tie_word_embeddings": config.share_embedding_weights,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }


def _state(model: GPTModel) -> dict[str, Tensor]:
    config = model.config
    state = model.model.state_dict()
    converted = {
        "model.embed_tokens.weight": state["embedding_layer.word_embeddings.weight"],
        "model.norm.weight": state["ln_f.weight"],
        "lm_head.weight": state["lm_head.weight"],
    }
    for index in range(config.num_hidden_layers):
        here = f"transformer_decoder.layers.{index}"
        there = f"model.layers.{index}"
        weights = {
            "input_layernorm": state[f"{here}.norm1.weight"],
            "post_attention_layernorm": state[f"{here}.norm3.weight"],
            "self_attn.q_proj": _halves(
                state[f"{here}.self_attn.proj_q_dense_layer.weight"], config.num_heads
            ),
            "self_attn.k_proj": _halves(
                state[f"{here}.self_attn.proj_k_dense_layer.weight"], config.key_heads
            ),
            "self_attn.v_proj": state[f"{here}.self_attn.proj_v_dense_layer.weight"],
            "self_attn.o_proj": state[f"{here}.self_attn.proj_output_dense_layer.weight"],
            "mlp.up_proj": state[f"{here}.ffn.ffn.0.linear_layer.weight"],
            "mlp.gate_proj": state[f"{here}.ffn.ffn.0.linear_layer_for_glu.weight"],
            "mlp.down_proj": state[f"{here}.ffn.ffn.1.linear_layer.weight"],
        }
        converted |= {f"{there}.{name}.weight": weight for name, weight in weights.items()}
    return converted


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of Transformers, which turns entries i and i + d/2 of a head together; here 2i and 2i + 1.

    Example:
        >>> import torch
        >>> _halves(torch.arange(4.0).unsqueeze(1), heads=1).flatten().tolist()
        [0.0, 2.0, 1.0, 3.0]
    """
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
