"""The decoder under the names of Transformers' architectures: the same logits there, and the same again here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from rarefy.architectures.registry import nearest
from rarefy.architectures.translation import from_file, to_file
from rarefy.errors import RarefyError
from rarefy.export import SavedModel, export
from rarefy.models import GPTModel, build_model
from saved_models import tokens
from small_decoders import DECODERS, GPT2, MIXTRAL, small_decoder

IDS = tokens(2, 20)


def logits(model: GPTModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(IDS)


def again(name: str, model: GPTModel) -> GPTModel:
    """The decoder out of the file that was made of it, built from the file's own options."""
    architecture, _ = nearest(model.config)
    made = build_model(architecture.as_keys(architecture.as_options(model.config))).eval()
    assert isinstance(made, GPTModel)
    named = to_file(architecture, model.config, model.model.state_dict())
    found = made.model.load_state_dict(from_file(architecture, made.config, named), strict=False)
    assert not found.unexpected_keys and all("slopes" in key for key in found.missing_keys)
    return made


@pytest.mark.parametrize("name", DECODERS)
def test_logits_in_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    keys, kind = DECODERS[name]
    model = small_decoder(name)
    params = {"trainer": {"init": {"model": keys}}}
    export(SavedModel(Path("run"), model.state_dict(), params), "hf", tmp_path / "folder")
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "folder", output_loading_info=True
    )
    assert type(loaded).__name__ == kind
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        found = loaded.eval()(IDS).logits
    expected = logits(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
    assert float(expected.std()) > 0.5


@pytest.mark.parametrize("name", DECODERS)
def test_there_and_back(name: str) -> None:
    model = small_decoder(name)
    torch.testing.assert_close(logits(again(name, model)), logits(model), rtol=1e-5, atol=1e-5)


def test_zeros_stay_zeros() -> None:
    model = small_decoder("llama_mup")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[::2] = 0.0
    architecture, _ = nearest(model.config)
    named = to_file(architecture, model.config, model.model.state_dict())
    found = sum(int((tensor == 0).sum()) for tensor in named.values())
    assert found == sum(int((parameter == 0).sum()) for parameter in model.parameters())


def test_a_file_whose_names_lack_the_prefix(tmp_path: Path) -> None:
    model = small_decoder("gpt2")
    architecture, _ = nearest(model.config)
    named = to_file(architecture, model.config, model.model.state_dict())
    bare = {name.removeprefix("transformer."): tensor for name, tensor in named.items()}
    state = from_file(architecture, model.config, {**bare, "h.0.attn.bias": torch.ones(1)})
    assert torch.equal(state["ln_f.weight"], model.model.state_dict()["ln_f.weight"])


def test_files_that_lack_a_tensor_or_have_another() -> None:
    model = small_decoder("gpt2")
    architecture, _ = nearest(model.config)
    named = to_file(architecture, model.config, model.model.state_dict())
    with pytest.raises(
        RarefyError, match=r"the gpt2 file has, without a place in the decoder, transformer.extra"
    ):
        from_file(architecture, model.config, {**named, "transformer.extra": torch.ones(1)})
    del named["transformer.ln_f.bias"]
    with pytest.raises(RarefyError, match=r"the gpt2 file lacks transformer\.ln_f\.bias"):
        from_file(architecture, model.config, named)


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({**GPT2, "norm_type": "rmsnorm"}, "norm_type: rmsnorm"),
        ({**GPT2, "use_bias_in_output": True}, "use_bias_in_output: true"),
        ({**GPT2, "embeddings_scale": 0.0}, "embeddings_scale: 0"),
        ({**GPT2, "position_embedding_type": "alibi"}, "position_embedding_type: alibi"),
        ({**GPT2, "position_embedding_type": None}, "position_embedding_type: null"),
        ({**GPT2, "moe": {"num_experts": 2}}, "norm_type: layernorm"),
        ({**DECODERS["bloom"][0], "nonlinearity": "gelu"}, "nonlinearity: gelu"),
        ({**DECODERS["bloom"][0], "filter_size": 64}, "filter_size: 64"),
        ({**DECODERS["llama"][0], "rotary_dim": 4}, r"rotary_dim: 4 \(a head has 8\)"),
        ({**DECODERS["gptj"][0], "rotary_pairs": "halves"}, "rotary_pairs: halves"),
        ({**DECODERS["gptj"][0], "use_untied_layer_norm": True}, "use_untied_layer_norm: true"),
        ({**DECODERS["gptj"][0], "rope_theta": 5.0}, "rope_theta: 5.0"),
        (
            {**DECODERS["gptj"][0], "position_embedding_type": "learned"},
            "position_embedding_type: learned|attention beside the feed-forward part",
        ),
        ({**MIXTRAL, "moe": {"num_experts": 4, "null_expert_bias": 1.1}}, "moe.null_expert_bias: 1.1"),
        ({**MIXTRAL, "moe": {"num_experts": 4, "routing_algorithm": "hash"}}, "moe.routing_algorithm: hash"),
        (
            {**DECODERS["starcoder"][0], "extra_attention_params": {"num_kv_groups": 2}},
            "extra_attention_params.num_kv_groups: 2",
        ),
        (
            {
                **DECODERS["llama_yarn"][0],
                "pos_scaling_extra_args": {
                    "original_max_position_embeddings": 8,
                    "extrapolation_factor": 0.5,
                },
            },
            "pos_scaling_extra_args.extrapolation_factor: 0.5",
        ),
    ],
)
def test_what_no_architecture_can_compute(tmp_path: Path, keys: dict[str, Any], problem: str) -> None:
    model = build_model(keys)
    saved = SavedModel(Path("run"), model.state_dict(), {"trainer": {"init": {"model": keys}}})
    with pytest.raises(
        RarefyError, match=rf"--to hf: .*({problem}).* is not allowed in the nearest"
    ) as caught:
        export(saved, "hf", tmp_path / "folder")
    assert "\n" not in str(caught.value) and not (tmp_path / "folder").exists()
