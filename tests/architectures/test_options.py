"""What a `config.json` says, as keys of the decoder."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.architectures.bloom import BLOOM
from rarefy.architectures.gemma2 import GEMMA2
from rarefy.architectures.gpt2 import GPT2, GPT_BIG_CODE
from rarefy.architectures.gptj import FALCON, GPTJ
from rarefy.architectures.llama import LLAMA, MISTRAL
from rarefy.architectures.nonlinearities import gated_named, plain_named
from rarefy.architectures.rope import rope_keys
from rarefy.errors import RarefyError

SIZES = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2}
LLAMA_SIZES = {**SIZES, "intermediate_size": 16}
GPT_SIZES = {"vocab_size": 9, "n_embd": 8, "n_layer": 1, "n_head": 2}
BLOOM_SIZES = {"vocab_size": 9, "hidden_size": 8, "n_layer": 1, "n_head": 2}


def test_what_a_file_leaves_out_has_transformers_defaults() -> None:
    assert LLAMA.as_keys(LLAMA_SIZES)["layer_norm_epsilon"] == 1e-6
    assert MISTRAL.as_keys(LLAMA_SIZES)["attention_sliding_window_length"] == 4096
    assert "attention_sliding_window_length" not in MISTRAL.as_keys({**LLAMA_SIZES, "sliding_window": None})
    assert GPT2.as_keys(GPT_SIZES)["nonlinearity"] == "gelu_new"
    assert GPT2.as_keys(GPT_SIZES)["filter_size"] == 32
    keys = GPT2.as_keys({**GPT_SIZES, "scale_attn_weights": False, "scale_attn_by_inverse_layer_idx": True})
    assert (keys["attention_type"], keys["scale_qk_dot_by_layer_idx"]) == ("dot_product", True)
    assert "attention_module" not in GPT_BIG_CODE.as_keys({**GPT_SIZES, "multi_query": False})
    falcon = FALCON.as_keys({**SIZES, "new_decoder_architecture": True, "num_kv_heads": 1})
    assert (falcon["use_untied_layer_norm"], falcon["filter_size"]) == (True, 32)


def test_gemmas_scores_may_be_divided_by_another_number() -> None:
    keys = GEMMA2.as_keys({**LLAMA_SIZES, "head_dim": 4, "query_pre_attn_scalar": 16})
    assert keys["attention_logits_alpha"] == 0.5


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        (None, "sliding_window_first"),
        (["full_attention", "sliding_attention"] * 2, "full_attention_first"),
        (["sliding_attention"] * 4, None),
    ],
)
def test_gemmas_windows(kinds: list[str] | None, expected: str | None) -> None:
    keys = GEMMA2.as_keys({**LLAMA_SIZES, "layer_types": kinds})
    assert keys.get("sliding_window_every_other_decoder_layer_pattern") == expected
    assert keys["attention_sliding_window_length"] == 4096


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({}, {"rope_theta": 1e4}),
        ({"rope_theta": 5, "rope_scaling": None}, {"rope_theta": 5.0}),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_theta": 1e4, "pos_scaling_type": "linear", "pos_scaling_factor": 2.0},
        ),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "rope_theta": 5e5,
                    "factor": 8.0,
                    "low_freq_factor": 2.0,
                }
            },
            {
                "rope_theta": 5e5,
                "pos_scaling_type": "llama3",
                "pos_scaling_factor": 8.0,
                "pos_scaling_extra_args": {"low_freq_factor": 2.0},
            },
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2},
            },
            {
                "rope_theta": 1e4,
                "pos_scaling_type": "yarn",
                "pos_scaling_factor": 4.0,
                "pos_scaling_extra_args": {
                    "original_max_position_embeddings": 64,
                    "mscale_a": 0.0,
                    "mscale_b": 2.0,
                },
            },
        ),
    ],
)
def test_rotary_positions(options: dict[str, Any], keys: dict[str, Any]) -> None:
    assert rope_keys(options) == keys


@pytest.mark.parametrize(
    ("scaling", "problem"),
    [
        ({"rope_type": "dynamic", "factor": 2.0}, "rope_type 'dynamic'"),
        ({"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}, "mscale of yarn"),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_rotary_positions_that_the_decoder_lacks(scaling: dict[str, Any], problem: str) -> None:
    with pytest.raises(RarefyError, match=rf"config.json: {problem} is not allowed"):
        rope_keys({"rope_scaling": scaling})


def test_nonlinearities_by_any_name() -> None:
    assert [plain_named(name) for name in ("gelu", "gelu_fast", "gelu_pytorch_tanh", "swish")] == [
        "gelu",
        "gelu_new",
        "gelu_new",
        "silu",
    ]
    assert gated_named("gelu_pytorch_tanh") == "geglu_new"
    with pytest.raises(RarefyError, match="the activation 'elu' is not allowed; give one of gelu"):
        plain_named("elu")


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda: FALCON.as_keys({**SIZES, "alibi": True}), "alibi: true"),
        (lambda: FALCON.as_keys({**SIZES, "parallel_attn": False}), "parallel_attn: false"),
        (lambda: GPTJ.as_keys({**GPT_SIZES, "rotary_dim": None}), "rotary_dim: null"),
        (
            lambda: BLOOM.as_keys({**BLOOM_SIZES, "apply_residual_connection_post_layernorm": True}),
            "apply_residual_connection_post_layernorm: true",
        ),
        (
            lambda: GEMMA2.as_keys(
                {**LLAMA_SIZES, "layer_types": ["full_attention"] * 3 + ["sliding_attention"]}
            ),
            "these layer_types",
        ),
    ],
)
def test_options_that_the_decoder_lacks(read: Any, problem: str) -> None:
    with pytest.raises(RarefyError, match=rf"config.json: {problem}"):
        read()
