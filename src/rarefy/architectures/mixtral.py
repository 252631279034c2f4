"""Mixtral: a Mistral whose feed-forward parts are experts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

from rarefy.architectures.architecture import Architecture, Options, Row, in_yaml, leaves, same, without
from rarefy.architectures.changes import Apart
from rarefy.architectures.llama import (
    ALLOWED,
    DEFAULTS,
    NORMS,
    SIZES,
    attention_rows,
    mistral_keys,
    mistral_options,
    outer,
    whole_heads_turn,
)
from rarefy.decoder.decoder_config import GPTConfig


def _moe_misfits(config: GPTConfig) -> Iterator[str]:
    yield from whole_heads_turn(config)
    moe = config.moe
    needed = {
        "num_shared_experts": (None, 0),
        "null_expert_bias": (None, 0.0),
        "router_use_bias": (None, False),
        "routing_algorithm": ("learned",),
        "router_selection_nonlinearity": ("softmax", None),
        "expert_weighting_nonlinearity": ("softmax", None),
        "expert_weighting_normalization": (True,),
        "probability_before_ffn": (False,),
    }
    if not moe.is_on:
        yield "moe.num_experts: 0"
    for key, allowed in needed.items():
        if getattr(moe, key) not in allowed:
            yield f"moe.{key}: {in_yaml(getattr(moe, key))}"


def _mixtral_options(config: GPTConfig) -> dict[str, Any]:
    experts = {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "router_aux_loss_coef": config.moe.load_balancing_loss_coef,
    }
    return mistral_options(config) | experts


def _mixtral_keys(options: Options) -> dict[str, Any]:
    experts = {
        "num_experts": options["num_local_experts"],
        "top_k": options["num_experts_per_tok"],
        "load_balancing_loss_coef": float(options["router_aux_loss_coef"]),
    }
    return mistral_keys(options) | {"moe": experts}


# w1 is the gate of w3, and w2 leads back.
_EXPERT: Mapping[str, tuple[str, str]] = MappingProxyType(
    {"w1": ("0", "linear_layer_for_glu"), "w3": ("0", "linear_layer"), "w2": ("1", "linear_layer")}
)


def _expert_rows(config: GPTConfig) -> list[Row]:
    """Each expert's three matrices, in whichever layout the decoder has them."""
    count = config.moe.num_experts
    experts = "block_sparse_moe.experts"
    layout = config.moe.moe_implementation
    if layout == "optimized":
        return [
            Row(
                tuple(f"{experts}.{number}.{name}.weight" for number in range(count)),
                (f"ffn.experts.fused_ffns.{place}.{layer}.expert_weights",),
                Apart(),
            )
            for name, (place, layer) in _EXPERT.items()
        ]
    middle = "" if layout == "experimental" else "ffn."
    names = {
        f"{experts}.{number}.{name}": f"ffn.experts.experts.{number}.{middle}{place}.{layer}"
        for number in range(count)
        for name, (place, layer) in _EXPERT.items()
    }
    return same(names, leaves(False))


def _mixtral_rows(config: GPTConfig) -> list[Row]:
    gate = {"block_sparse_moe.gate": "ffn.gate"}
    plain = same({**NORMS, **gate}, leaves(False))
    return [*plain, *attention_rows(config), *_expert_rows(config)]


MIXTRAL = Architecture(
    model_type="mixtral",
    model_class="MixtralForCausalLM",
    model="mixtral",
    allowed=without(ALLOWED, "attention_sliding_window_length"),
    sizes=SIZES,
    defaults={
        **DEFAULTS,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.001,
        "rope_theta": 1000000.0,
    },
    options=_mixtral_options,
    keys=_mixtral_keys,
    outer=outer,
    inner=_mixtral_rows,
    layers="model.layers.{}.",
    misfits=_moe_misfits,
)
