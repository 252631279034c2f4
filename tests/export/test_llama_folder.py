"""The decoder as Llama and Mistral of Transformers: the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.decoder.decoder_config import GPTConfig
from rarefy.export import export
from rarefy.export.llama_folder import is_llama
from rarefy.models import GPTModel
from saved_models import checkpoint, tokens

LLAMA: dict[str, Any] = {
    "name": "llama",
    "vocab_size": 32,
    "hidden_size": 32,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "filter_size": 24,
    "max_position_embeddings": 32,
    "position_embedding_type": "rotary",
    "rotary_dim": 8,
    "norm_type": "rmsnorm",
    "nonlinearity": "swiglu",
    "share_embedding_weights": False,
    "use_projection_bias_in_attention": False,
    "use_ffn_bias_in_attention": False,
    "use_ffn_bias": False,
    "attention_module": "multiquery_attention",
    "extra_attention_params": {"num_kv_groups": 2},
    "initializer": {"std": 0.3},
}
SCALED = {
    "rope_theta": 500000.0,
    "pos_scaling_type": "llama3",
    "pos_scaling_factor": 8.0,
    "pos_scaling_extra_args": {"original_max_position_embeddings": 16},
}


@pytest.mark.parametrize(
    ("keys", "kind"),
    [
        ({}, "LlamaForCausalLM"),
        (SCALED, "LlamaForCausalLM"),
        ({"pos_scaling_factor": 2.0, "share_embedding_weights": True}, "LlamaForCausalLM"),
        ({"attention_sliding_window_length": 5}, "MistralForCausalLM"),
        ({"attention_inner_dim": 64, "rotary_dim": 16}, "LlamaForCausalLM"),
    ],
)
def test_logits_are_the_same(tmp_path: Path, keys: dict[str, Any], kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    path, model = checkpoint(tmp_path, {**LLAMA, **keys})
    export(path, "hf", tmp_path / "folder")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "folder").eval()
    assert type(loaded).__name__ == kind
    ids = tokens(2, 20)
    with torch.no_grad():
        expected = model.eval().model(ids)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize(
    "keys",
    [{"use_ffn_bias": True}, {"norm_type": "layernorm"}, {"rotary_dim": 4}, {"embeddings_scale": 2.0}],
)
def test_what_llama_cannot_express(keys: dict[str, Any]) -> None:
    options = {key: value for key, value in {**LLAMA, **keys}.items() if key != "name"}
    assert is_llama(GPTConfig(**{key: value for key, value in LLAMA.items() if key != "name"}))
    assert not is_llama(GPTConfig(**options))
    assert isinstance(GPTModel(GPTConfig(**options)), GPTModel)
