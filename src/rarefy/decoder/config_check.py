"""What the keys of a decoder must obey together."""

from __future__ import annotations

import logging
from collections.abc import Callable

from rarefy.decoder.decoder_config import GPTConfig
from rarefy.decoder.weight_initializer import InitializerConfig
from rarefy.errors import ConfigError

log = logging.getLogger("rarefy")

_INITIALIZERS = (
    "initializer",
    "embedding_initializer",
    "output_layer_initializer",
    "ffn_initializer",
    "ffn_output_layer_initializer",
)


def check_config(config: GPTConfig) -> None:
    """Refuses keys that do not go together.

    Raises:
        ConfigError: the first such key, with what would go.
    """
    for check in _CHECKS:
        check(config)


def _check_heads(config: GPTConfig) -> None:
    inner = config.inner_size
    if inner % config.num_heads:
        name = "hidden_size" if config.attention_inner_dim is None else "attention_inner_dim"
        raise ConfigError("num_heads", config.num_heads, f"a divisor of {name} ({inner})")
    unknown = [
        key for key in config.extra_attention_params if key not in ("num_kv_groups", "attention_kernel")
    ]
    if unknown:
        raise ConfigError(
            "extra_attention_params", f"the key {unknown[0]!r}", "num_kv_groups", "{num_kv_groups: 8}"
        )
    groups = config.extra_attention_params.get("num_kv_groups")
    if groups is None:
        return
    # Of that name every head has keys of its own.
    if config.attention_module == "aiayn_attention":
        allowed = "it with attention_module: multiquery_attention only"
        raise ConfigError("extra_attention_params.num_kv_groups", groups, allowed)
    if not isinstance(groups, int) or groups < 1 or config.num_heads % groups:
        allowed = f"a divisor of num_heads ({config.num_heads})"
        raise ConfigError("extra_attention_params.num_kv_groups", groups, allowed)


def _check_positions(config: GPTConfig) -> None:
    kind = config.position_embedding_type
    if kind == "rotary":
        size = config.rotary_size
        # Entries turn in pairs.
        if size % 2 or not 0 < size <= config.head_size:
            allowed = f"an even number of at most {config.head_size} (the size of a head)"
            raise ConfigError("rotary_dim", size, allowed)
    elif config.pos_scaling_factor != 1.0 and kind != "alibi":
        allowed = "1.0, or position_embedding_type: rotary or alibi"
        raise ConfigError("pos_scaling_factor", config.pos_scaling_factor, allowed)
    if kind == "alibi" and config.scaling_type != "linear":
        raise ConfigError("pos_scaling_type", config.pos_scaling_type, "linear with alibi")


def _check_window(config: GPTConfig) -> None:
    if config.attention_sliding_window_length is not None:
        if config.attention_sink_tokens and not config.sees_sinks:
            log.warning(
                "attention_sink_tokens: as in Model Zoo 2.10, only gptj and falcon keep the sink tokens in sight of "
                "every window; in this model they leave it like any other token"
            )
        return
    if config.sliding_window_every_other_decoder_layer:
        allowed = "false, or attention_sliding_window_length"
        raise ConfigError("sliding_window_every_other_decoder_layer", "true", allowed)
    if config.attention_sink_tokens:
        allowed = "null, or attention_sliding_window_length (without a window every token is seen anyway)"
        raise ConfigError("attention_sink_tokens", config.attention_sink_tokens, allowed)


def _check_mup(config: GPTConfig) -> None:
    given = {
        "mup_base_hidden_size": config.mup_base_hidden_size,
        "mup_base_filter_size": config.mup_base_filter_size,
    }
    missing = [key for key, value in given.items() if value is None]
    if len(missing) == 1:
        raise ConfigError(missing[0], "a missing value", "both mup_base_hidden_size and mup_base_filter_size")
    if not missing and config.output_logits_scale is not None:
        allowed = "output_logits_alpha beside the muP base sizes"
        raise ConfigError("output_logits_scale", config.output_logits_scale, allowed)


def _check_experts(config: GPTConfig) -> None:
    moe = config.moe
    if not moe.is_on:
        return
    if not moe.num_experts or moe.top_k > moe.num_experts:
        raise ConfigError("moe.top_k", moe.top_k, f"at most num_experts ({moe.num_experts})")
    # A token's number names one expert.
    if moe.routing_algorithm == "hash" and moe.top_k != 1:
        raise ConfigError("moe.top_k", moe.top_k, "1 with routing_algorithm: hash")
    # Only a router that learns can be drawn towards balance.
    if moe.routing_algorithm != "learned" and moe.load_balancing_loss_coef:
        allowed = "0.0 without routing_algorithm: learned"
        raise ConfigError("moe.load_balancing_loss_coef", moe.load_balancing_loss_coef, allowed)
    # It is a part of the sum by which weights are normalised.
    if moe.null_expert_bias and not moe.expert_weighting_normalization:
        allowed = "0.0, or expert_weighting_normalization: true"
        raise ConfigError("moe.null_expert_bias", moe.null_expert_bias, allowed)
    if moe.probability_before_ffn and moe.moe_implementation != "experimental":
        raise ConfigError("moe.probability_before_ffn", "true", "false, or moe_implementation: experimental")


def _check_initializers(config: GPTConfig) -> None:
    for key in _INITIALIZERS:
        given: InitializerConfig | None = getattr(config, key)
        if given is not None:
            given.check(key)


def _check_sandwich(config: GPTConfig) -> None:
    if config.is_parallel and config.norm_first_sandwich:
        raise ConfigError("norm_first_sandwich", "true", "false for gptj and falcon")


_CHECKS: tuple[Callable[[GPTConfig], None], ...] = (
    _check_heads,
    _check_positions,
    _check_window,
    _check_mup,
    _check_experts,
    _check_initializers,
    _check_sandwich,
)
