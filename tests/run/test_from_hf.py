"""`model: {from_hf: FOLDER}`: a run that starts from the weights of a Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_run
from rarefy.errors import ConfigError
from rarefy.export import SavedModel, export
from rarefy.models import GPTModel
from rarefy.models.hugging_face_folder import load_folder, model_block
from rarefy.run.builder import Builder
from rarefy.run.changed_file import changes_between
from rarefy.run.schema import json_schema, parse
from saved_models import tokens
from small_decoders import DECODERS, small_decoder

BATCHES = """
import torch


def make_batches():
    ids = torch.arange(40).reshape(4, 10) % 32
    return [{"input_ids": ids, "labels": (ids + 1) % 32}] * 3
"""


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return folder_of("llama", tmp_path / "llama")


def folder_of(name: str, out: Path) -> Path:
    model = small_decoder(name)
    params = {"trainer": {"init": {"model": DECODERS[name][0]}}}
    export(SavedModel(Path("run"), model.state_dict(), params), "hf", out)
    return out


def built(model: dict[str, Any]) -> GPTModel:
    [config] = parse({"trainer": {"init": {"model": model}}})
    made = Builder(config, Path()).model()
    assert isinstance(made, GPTModel)
    return made.eval()


def refusal(model: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        built(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["mixtral_fused", "gemma2", "gptj_mup", "falcon_grouped", "bloom", "santacoder_mup"]
)
def test_the_same_logits(tmp_path: Path, name: str) -> None:
    made = built({"from_hf": str(folder_of(name, tmp_path / "folder"))})
    ids = tokens(2, 20)
    with torch.no_grad():
        torch.testing.assert_close(made.model(ids), small_decoder(name).model(ids), rtol=1e-5, atol=1e-5)


def test_what_transformers_saves_in_several_files(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "folder", max_shard_size="4KB")
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    made = built({"from_hf": str(tmp_path / "folder")})
    with torch.no_grad():
        torch.testing.assert_close(
            made.model(tokens(2, 9)), theirs(tokens(2, 9)).logits, rtol=1e-5, atol=1e-5
        )


def test_a_run_begins_there_and_its_checkpoint_stands_alone(tmp_path: Path, llama: Path) -> None:
    content = tiny_run.configuration(tmp_path, {"sparsity": 0.5, "init_method": "topk"})
    content["trainer"]["init"]["model"] = {"from_hf": str(llama), "max_position_embeddings": 16}
    content["trainer"]["fit"] = {"train_dataloader": {"data_processor": "./data.py:make_batches"}}
    content["trainer"]["init"]["loop"] = {"max_steps": 2}
    content["trainer"]["init"]["optimizer"] = {"SGD": {"lr": 0.0}}
    (tmp_path / "data.py").write_text(BATCHES)
    path = tiny_run.write(tmp_path, content)
    result = tiny_run.rarefy("run", path)
    assert result.exit_code == 0, result.output
    saved = load_file(tmp_path / "out" / "checkpoint_2" / "model.safetensors")
    name = "model.transformer_decoder.layers.0.ffn.ffn.0.linear_layer.weight"
    given = small_decoder("llama").state_dict()[name]
    kept = torch.topk(given.abs().flatten(), given.numel() // 2).indices
    expected = torch.zeros_like(given).flatten()
    expected[kept] = given.flatten()[kept]
    if name in saved:
        assert torch.equal(saved[name].flatten(), expected)
    shutil.rmtree(llama)
    result = tiny_run.rarefy("export", tmp_path / "out", "--to", "hf", tmp_path / "again")
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "again" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(found.flatten(), expected)
    assert json.loads((tmp_path / "again" / "config.json").read_text())["max_position_embeddings"] == 16


def test_a_model_on_the_meta_device_is_only_checked(llama: Path) -> None:
    with torch.device("meta"):
        model = small_decoder("llama")
    load_folder(model, llama)
    assert model.model.lm_head.weight.is_meta


def test_other_weights_are_another_start(tmp_path: Path, llama: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    [before] = parse({"trainer": {"init": {"model": {"from_hf": str(llama)}}}})
    [now] = parse({"trainer": {"init": {"model": {"from_hf": str(other)}}}})
    [change] = changes_between(before, now)
    assert change.path == "init.model.from_hf" and change.needs_restart


def test_a_name_that_agrees_is_allowed_and_any_other_refused(llama: Path) -> None:
    assert built({"name": "Llama", "from_hf": str(llama), "dropout_rate": 0.2}).config.dropout_rate == 0.2
    message = refusal({"name": "gpt2", "from_hf": str(llama)})
    assert "init.model.name: 'gpt2' is not allowed; give llama, which is what the folder holds" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (3, "init.model.from_hf: 3 is not allowed; give the path of a Hugging Face folder"),
        ("nowhere", "nowhere/config.json: cannot be read (No such file or directory); give a folder of"),
    ],
)
def test_no_folder(given: Any, message: str) -> None:
    assert message in refusal({"from_hf": given})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("{", "config.json: cannot be read (Expecting"),
        ("[]", "config.json: is no map"),
        ('{"model_type": "mistrall"}', "model_type 'mistrall' is not allowed; give did you mean mistral?"),
        ('{"model_type": "llama"}', "config.json: has no 'vocab_size'; give a complete one"),
    ],
)
def test_folders_of_other_models(llama: Path, options: str, message: str) -> None:
    (llama / "config.json").write_text(options)
    assert message in refusal({"from_hf": str(llama)})


def test_an_option_that_the_decoder_lacks(llama: Path) -> None:
    options = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**options, "rope_scaling": {"rope_type": "dynamic"}}))
    assert "rope_type 'dynamic' is not allowed" in refusal({"from_hf": str(llama)})


def test_weights_that_do_not_fit(llama: Path) -> None:
    assert (
        "embedding_layer.word_embeddings.weight is [32, 32] there and [40, 32] by the model's keys"
        in refusal({"from_hf": str(llama), "vocab_size": 40})
    )
    weights = load_file(llama / "model.safetensors")
    save_file({name: one for name, one in weights.items() if "norm" not in name}, llama / "model.safetensors")
    assert "the llama file lacks model.layers.0.input_layernorm.weight, " in refusal({"from_hf": str(llama)})
    (llama / "model.safetensors").write_bytes(b"no tensors")
    assert "its weights cannot be read (" in refusal({"from_hf": str(llama)})
    (llama / "model.safetensors").unlink()
    assert "has no model.safetensors; save the model with Transformers' save_pretrained" in refusal(
        {"from_hf": str(llama)}
    )


def test_a_model_of_ones_own_has_no_such_weights(tmp_path: Path) -> None:
    tiny_run.write(tmp_path, {})
    model = {"name": "./tiny.py:Tiny", "from_hf": str(tmp_path / "gone")}
    [config] = parse({"trainer": {"init": {"model": model}}})
    with pytest.raises(
        ConfigError, match=r"gone beside Tiny is not allowed; give it for the built-in decoders"
    ):
        Builder(config, tmp_path).model()


def test_the_schema_asks_for_a_name_or_a_folder() -> None:
    block = json_schema()["$defs"]["ModelBlock"]
    assert block["anyOf"] == [{"required": ["name"]}, {"required": ["from_hf"]}] and "required" not in block


def test_supar_is_refused_beside_trained_weights(llama: Path) -> None:
    sparsity = {"sparsity": 0.5, "parametrization": "supar"}
    [config] = parse({"trainer": {"init": {"model": {"from_hf": str(llama)}, "sparsity": sparsity}}})
    with pytest.raises(ConfigError, match=r"sparsity\.parametrization: supar beside model\.from_hf"):
        _ = Builder(config, Path()).sparsity


def test_heads_turn_as_the_folder_orders_them_and_weights_are_its_own(llama: Path) -> None:
    model = built({"from_hf": str(llama)})
    there = load_file(llama / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    query = "transformer_decoder.layers.0.self_attn.proj_q_dense_layer.weight"
    assert torch.equal(model.model.get_parameter(query), there)
    other = built({"from_hf": str(llama), "rotary_pairs": "adjacent"})
    assert not torch.equal(other.model.get_parameter(query), there)
    ids = tokens(2, 20)
    torch.testing.assert_close(model.model(ids), other.model(ids), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_from_before_there_was_an_order_keeps_its_own(llama: Path) -> None:
    whole = {**model_block(llama), "from_hf": str(llama)}
    del whole["rotary_pairs"]

    def changes(**keys: Any) -> list[Any]:
        blocks = [whole, {"from_hf": str(llama), **keys}]
        before, now = (parse({"trainer": {"init": {"model": one}}})[0] for one in blocks)
        return changes_between(before, now)

    [change] = changes()
    assert change.needs_restart and str(change) == "init.model.rotary_pairs is halves, was adjacent"
    assert changes(rotary_pairs="adjacent") == []
