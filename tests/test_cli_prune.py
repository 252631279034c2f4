"""`rarefy prune` from the command line: runs and Hugging Face folders, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny_run
from rarefy.checkpoint.directory import load
from rarefy.cli.prune import read_pattern
from rarefy.errors import ConfigError, RarefyError
from rarefy.export import SavedModel, export
from rarefy.models import build_model
from rarefy.models.hugging_face_folder import load_folder, model_block
from small_decoders import DECODERS, small_decoder
from tiny_run import rarefy


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """The folder of a dense run that trained for six steps."""
    content = tiny_run.configuration(tmp_path)
    del content["trainer"]["init"]["sparsity"]
    result = rarefy("run", tiny_run.write(tmp_path, content), "-m", "train")
    assert result.exit_code == 0, result.output
    return tmp_path


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("snip", "snip at sparsity 0.99 leaves no connection in"),
        ("grasp", "grasp at sparsity 0.99 leaves no connection in"),
    ],
)
def test_messages_are_about_flags_and_no_block(trained: Path, method: str, problem: str) -> None:
    flags = ["--method", method, "--sparsity", 0.99, "-p", trained / "params.yaml", "--batches", 1]
    result = rarefy("prune", trained / "out", trained / "pruned", *flags)
    assert result.exit_code == 2
    said = " ".join(result.stderr.split())
    assert problem in said and "init_method" not in said


def test_a_loss_is_no_flag(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cannot(*_: Any, **__: Any) -> Any:
        raise RarefyError("snip: the loss has no gradient; give loss: a function")

    monkeypatch.setattr("rarefy.export.pruned.prune", cannot)
    flags = ["--method", "snip", "--sparsity", 0.5, "-p", trained / "params.yaml"]
    result = rarefy("prune", trained / "out", trained / "pruned", *flags)
    said = " ".join(result.stderr.split())
    assert "the loss has no gradient; take --method magnitude, or rarefy.prune in Python" in said
    assert "give loss" not in said


def folder_of(name: str, out: Path) -> Path:
    model = small_decoder(name)
    params = {"trainer": {"init": {"model": DECODERS[name][0]}}}
    export(SavedModel(Path("run"), model.state_dict(), params), "hf", out)
    return out


def ids_file(folder: Path) -> Path:
    path = folder / "ids.npy"
    np.save(path, np.random.default_rng(0).integers(0, 32, 600))
    return path


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "snip", "magnitude"])
def test_a_run_becomes_one_that_can_be_trained_on(trained: Path, method: str) -> None:
    out = trained / "pruned"
    flags = ["--method", method, "--sparsity", 0.5, "-p", trained / "params.yaml", "--batches", 3]
    result = rarefy("prune", trained / "out", out, *flags)
    assert result.exit_code == 0, result.output
    for words in ("body.weight", "16 × 8", "0.5000", "loss before", "loss after", str(out)):
        assert words in result.stdout
    parts = load(out / "checkpoint_6")
    masks = {name.removesuffix("_mask") for name in parts.model if name.endswith("_mask")}
    assert masks == {"body.weight", "middle.weight", "head.weight"}
    for name in masks:
        assert not parts.model[name][~parts.model[f"{name}_mask"]].any()
    block = {"algorithm": "static", "sparsity": 0.5, "init_method": "from_zeros"}
    content = tiny_run.configuration(trained, block, model_dir=str(trained / "tuned"), loop={"num_steps": 2})
    content["trainer"]["fit"]["ckpt_path"] = str(out / "checkpoint_6")
    path = tiny_run.write(trained, content)
    result = rarefy("run", path, "-m", "train", "--load_checkpoint_states", "model")
    assert result.exit_code == 0, result.output
    tuned = load(trained / "tuned" / "checkpoint_2").model
    for name in masks:
        assert torch.equal(tuned[f"{name}_mask"], parts.model[f"{name}_mask"])
        assert not tuned[name][~tuned[f"{name}_mask"]].any()


@pytest.mark.parametrize("name", sorted(DECODERS))
def test_folders_of_every_architecture(tmp_path: Path, name: str) -> None:
    source = folder_of(name, tmp_path / "source")
    (source / "notes.txt").write_text("kept")
    (source / "pytorch_model.bin").write_text("left behind")
    out = tmp_path / "out"
    flags = ["--sparsity", 0.5, "--data", ids_file(tmp_path), "--batches", 2, "--sequence_length", 12]
    result = rarefy("prune", source, out, *flags)
    if result.exit_code == 2 and "which a Experts" in result.output:
        pytest.skip("experts are refused by name")
    assert result.exit_code == 0, result.output
    assert sorted(one.name for one in out.iterdir()) == ["config.json", "model.safetensors", "notes.txt"]
    before = load_file(source / "model.safetensors")
    after = load_file(out / "model.safetensors")
    assert list(before) == list(after)
    model = build_model(model_block(out), path="")
    load_folder(model, out)
    zeros = [int((one == 0).sum()) for name, one in after.items()]
    assert sum(zeros) > 100
    for key, tensor in after.items():
        changed = tensor != before[key]
        assert tensor.dtype == before[key].dtype and not tensor[changed].any()


def has_pattern(weight: torch.Tensor, pattern: str) -> bool:
    """Whether the active connections of a weight have a pattern."""
    active = weight != 0
    if pattern == "{block: [4, 4]}":
        counts = active.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).sum((1, 3))
        return bool(((counts == 0) | (counts == 16)).all())
    return all(bool((turned.unflatten(1, (-1, 4)).sum(2) <= 2).all()) for turned in (active, active.t()))


@pytest.mark.parametrize("name", ["llama", "falcon", "gemma2", "mistral", "gptj", "gpt2"])
@pytest.mark.parametrize("pattern", ["{block: [4, 4]}", "{n: 2, m: 4, transposable: true}"])
def test_patterns_over_several_outputs_hold_in_the_files(tmp_path: Path, name: str, pattern: str) -> None:
    source = folder_of(name, tmp_path / "source")
    flags = ["--method", "magnitude", "--sparsity", 0.5, "--pattern", pattern]
    result = rarefy("prune", source, tmp_path / "out", *flags)
    assert result.exit_code == 0, result.output
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    pruned = [key for key in after if not torch.equal(after[key], before[key])]
    assert pruned and all(has_pattern(after[key], pattern) for key in pruned), pruned


def test_number_formats_shards_and_untouched_tensors(tmp_path: Path) -> None:
    source = folder_of("llama", tmp_path / "source")
    tensors = {name: one.bfloat16() for name, one in load_file(source / "model.safetensors").items()}
    names = sorted(tensors)
    shards = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, own in shards.items():
        save_file({name: tensors[name] for name in own}, source / file, {"format": "pt"})
    (source / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {name: file for file, own in shards.items() for name in own}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    out = tmp_path / "out"
    flags = [
        "--method",
        "sparsegpt",
        "--pattern",
        "2:4",
        "--data",
        ids_file(tmp_path),
        "--sequence_length",
        9,
    ]
    result = rarefy("prune", source, out, *flags)
    assert result.exit_code == 0, result.output
    assert "0.5000" in result.stdout
    for file, own in shards.items():
        found = load_file(out / file)
        assert sorted(found) == sorted(own)
        for name in own:
            assert found[name].dtype == torch.bfloat16
            is_pruned = "proj" in name
            assert is_pruned or torch.equal(found[name], tensors[name])
            assert not is_pruned or ((found[name].view(-1, 4) != 0).sum(1) <= 2).all()
    assert json.loads((out / "model.safetensors.index.json").read_text()) == index


def test_bytes_are_tokens_without_a_tokenizer(tmp_path: Path) -> None:
    model = {"name": "gpt2", "vocab_size": 256, "hidden_size": 16, "num_heads": 2, "num_hidden_layers": 1}
    model |= {"filter_size": 32, "max_position_embeddings": 16}
    torch.manual_seed(0)
    made = build_model(model)
    params = {"trainer": {"init": {"model": model}}}
    export(SavedModel(Path("run"), made.state_dict(), params), "hf", tmp_path / "source")
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_text("some text " * 20)
    (texts / "b.txt").write_text("more of it " * 20)
    result = rarefy("prune", tmp_path / "source", tmp_path / "out", "--sparsity", 0.5, "--data", texts)
    assert result.exit_code == 0, result.output


FAULTS: list[tuple[list[Any], str]] = [
    (
        ["none", "new", "--sparsity", 0.5],
        "none: does not exist; give a checkpoint_<step> directory or a model_dir, or a Hugging Face folder, which",
    ),
    (
        ["taken", "new", "--sparsity", 0.5],
        "the model_dir of a run that saved one, or a Hugging Face folder, which has a config.json",
    ),
    (["out", "new"], "--sparsity: a missing value is not allowed; give a fraction in [0, 1)"),
    (["out", "new", "--sparsity", 1.5], "--sparsity: 1.5 is not allowed"),
    (
        ["out", "new", "--sparsity", 0.5, "--method", "wandaa"],
        "--method: 'wandaa' is not allowed; give one of",
    ),
    (
        ["out", "new", "--sparsity", 0.5, "--pattern", "{n"],
        "--pattern: '{n' is not allowed; give unstructured, 2:4",
    ),
    (["out", "new", "--sparsity", 0.5, "--pattern", "4:2"], "--pattern: "),
    (["out", "new", "--pattern", "4:2"], "--pattern: 4:2 is not allowed; give n of m with 0 < n < m"),
    (["out", "new", "--pattern", "0:0"], "--pattern: 0:0 is not allowed; give n of m with 0 < n < m"),
    (["out", "new", "--pattern", "{block: [8, 8]}"], "--sparsity: a missing value"),
    (
        ["out", "new", "--sparsity", 0.5, "--param_filter", "x"],
        "--param_filter: 'x' (it matches no parameter)",
    ),
    (
        ["out", "out", "--sparsity", 0.5, "--force"],
        "is out itself, inside of it or around it; give another path",
    ),
    (["out", "out/in", "--sparsity", 0.5], "inside of it or around it"),
    (["out", "taken", "--sparsity", 0.5], "taken: exists already; give another path, or --force"),
    (
        ["out", "taken", "--sparsity", 0.5, "--force"],
        "taken: has other things than a model in it, so --force does",
    ),
    (
        ["out", "new", "--sparsity", 0.5, "--data", "params.yaml"],
        "--data: text for Tiny, which is no language model,",
    ),
    (
        ["llama", "new", "--sparsity", 0.5],
        "--data: wanda for a Hugging Face folder without it is not allowed",
    ),
    (["llama", "new", "--sparsity", 0.5, "--data", "none.txt"], "--data none.txt: there is no such file"),
    (["llama", "new", "--sparsity", 0.5, "--data", "params.yaml"], "has the token 1"),
    (
        ["llama", "new", "--sparsity", 0.5, "--data", "short.npy"],
        "3 tokens are fewer than a sequence of 32 takes",
    ),
    (
        ["llama", "new", "--sparsity", 0.5, "--data", "zeros.npy", "--sequence_length", 33],
        "--sequence_length: a sequence of 33 tokens is not allowed; give at most 32 tokens",
    ),
    (
        ["llama", "new", "--sparsity", 0.5, "--data", "halves.npy"],
        "cannot be read (its numbers are float64, not whole)",
    ),
    (["out", "new", "--sparsity", 0.5, "--no-imports"], "imports are off"),
    (["out", "new", "--sparsity", 0.5, "--target_device", "tpu"], "tpu"),
]


@pytest.mark.parametrize(("arguments", "problem"), FAULTS, ids=range(len(FAULTS)))
def test_bad_input_is_one_line(trained: Path, monkeypatch: pytest.MonkeyPatch, arguments, problem) -> None:
    monkeypatch.chdir(trained)
    folder_of("llama", trained / "llama")
    (trained / "taken").mkdir()
    (trained / "taken" / "letter.txt").write_text("mine")
    np.save("short.npy", np.arange(3))
    np.save("halves.npy", np.ones(3) / 2)
    np.save("zeros.npy", np.zeros(99, dtype=np.int64))
    before = sorted(one.name for one in trained.iterdir())
    more = [] if arguments[0] == "llama" else ["-p", "params.yaml"]
    result = rarefy("prune", *arguments, *more)
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem in result.stderr.splitlines()[-1] and result.stderr.count("Error:") == 1
    assert sorted(one.name for one in trained.iterdir()) == before
    assert (trained / "taken" / "letter.txt").read_text() == "mine"


@pytest.mark.parametrize("fault", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["out", "llama"])
def test_a_full_disk_and_an_interruption_leave_nothing(trained: Path, monkeypatch, fault, kind) -> None:
    monkeypatch.chdir(trained)
    folder_of("llama", trained / "llama")
    ids = ids_file(trained)

    def fail(*_: Any) -> Any:
        raise fault

    where = (
        "rarefy.checkpoint.writing.frozen.write_file" if kind == "out" else "rarefy.export.pruned.write_file"
    )
    monkeypatch.setattr(where, fail)
    before = sorted(one.name for one in trained.iterdir())
    more = ["-p", "params.yaml"] if kind == "out" else ["--data", ids, "--sequence_length", 8]
    result = rarefy("prune", kind, "new", "--sparsity", 0.5, *more)
    assert result.exit_code == (130 if isinstance(fault, KeyboardInterrupt) else 2), result.output
    assert sorted(one.name for one in trained.iterdir()) == before
    assert result.stderr.count("Error:") == 1


def test_force_replaces_a_folder_of_the_same_kind(trained: Path) -> None:
    flags = ["--method", "magnitude", "-p", trained / "params.yaml"]
    assert rarefy("prune", trained / "out", trained / "new", "--sparsity", 0.5, *flags).exit_code == 0
    result = rarefy("prune", trained / "out", trained / "new", "--sparsity", 0.75, "--force", *flags)
    assert result.exit_code == 0 and "0.75" in result.stdout
    mask = load(trained / "new" / "checkpoint_6").model["body.weight_mask"]
    assert int(mask.sum()) == 32


@pytest.mark.parametrize(
    ("text", "pattern"),
    [("unstructured", "unstructured"), ("1:4", {"n": 1, "m": 4}), ("{block: [2, 4]}", {"block": [2, 4]})],
)
def test_patterns(text, pattern):
    assert read_pattern(text) == pattern


def test_no_pattern():
    with pytest.raises(ConfigError, match="--pattern"):
        read_pattern("[")
