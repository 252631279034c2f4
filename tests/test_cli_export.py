"""`rarefy export` and `rarefy inspect` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import tiny_run
from rarefy.checkpoint.directory import CheckpointParts, save
from saved_models import TINY, checkpoint
from tiny_run import configuration, rarefy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run that trained for six steps."""
    balanced = {"*body.weight": {"balance_out_groups": 4}, "*middle.weight": {}}
    sparsity = {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 3}, "param_filter": balanced}
    result = rarefy("run", tiny_run.write(tmp_path, configuration(tmp_path, sparsity)), "-m", "train")
    assert result.exit_code == 0, result.output
    return tmp_path


def test_export_says_what_it_came_to(run: Path) -> None:
    out = run / "model.pt"
    result = rarefy("export", run / "out", "--to", "dense", out)
    assert result.exit_code == 0, result.output
    for words in (f"{out} (dense)", "1,732 bytes", f"{out.stat().st_size:,} bytes", "of 433", "0.7500 in 2"):
        assert words in result.stdout
    state = torch.load(out, weights_only=True)
    assert (state["body.weight"] == 0).float().mean() >= 0.75
    again = rarefy("export", run / "out" / "checkpoint_6", "--to", "dense", out)
    assert (again.exit_code, again.stdout) == (2, "")
    assert "exists already" in again.stderr
    assert rarefy("export", run / "out", "--to", "csr", out, "--force").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["none", "--to", "dense"], "does not exist; give a checkpoint_<step> directory or a model_dir"),
        (["out", "--to", "dence"], "'dence' is not allowed; give dense, safetensors, csr, onnx, hf (did you"),
        (["out", "--to", "hf", "--no-imports"], "imports are off"),
        (["out", "--to", "hf", "-p", "none.yaml"], "none.yaml: cannot be read"),
        (["out", "--to", "hf", "-p", "params.yaml"], "--to hf: Tiny is not allowed"),
        (["empty", "--to", "dense"], "holds no valid checkpoint"),
        (["damaged", "--to", "dense"], "is not valid JSON; use another checkpoint"),
    ],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    checkpoint(tmp_path, TINY)
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "MANIFEST.json").write_text("{")
    monkeypatch.chdir(tmp_path)
    result = rarefy("export", *arguments, "exported")
    assert result.exit_code == 2
    (fault,) = [line for line in result.stderr.splitlines() if "newest valid checkpoint is" not in line]
    assert problem in fault
    assert not (tmp_path / "exported").exists()


def test_a_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path, TINY)
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = rarefy("export", path, "--to", "onnx", tmp_path / "model.onnx")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "pip install 'rarefy[onnx]'" in result.stderr


def test_inspect_shows_sparse_weights(run: Path) -> None:
    result = rarefy("inspect", run / "out")
    assert result.exit_code == 0, result.output
    for words in ("checkpoint_6, step 6", "body.weight", "16 × 8", "masked", "32 of 128", "4 out"):
        assert words in result.stdout
    assert "0.7500..0.7500" in result.stdout and "96 of 384" in result.stdout
    assert "head.weight" not in result.stdout
    assert "head.weight" in rarefy("inspect", run / "out", "--all").stdout


def test_inspect_as_json(run: Path) -> None:
    found = json.loads(rarefy("inspect", run / "out", "--json").stdout)
    assert (found["step"], found["path"]) == (6, str(run / "out" / "checkpoint_6"))
    body, middle = found["parameters"]
    assert (body["name"], body["shape"], body["sparsity"]) == ("body.weight", [16, 8], 0.75)
    assert body["balance"] == {"option": "balance_out_groups", "groups": 4, "lowest": 0.75, "highest": 0.75}
    assert middle["balance"] is None
    assert list(body["quantiles"]) == ["0.05", "0.5", "0.95"]
    assert found["totals"]["sparse"] == {"parameters": 2, "size": 384, "active": 96, "sparsity": 0.75}
    everything = json.loads(rarefy("inspect", run / "out", "--json", "--all").stdout)
    assert len(everything["parameters"]) == 6
    assert everything["totals"] == found["totals"]


def test_inspect_of_files(run: Path) -> None:
    rarefy("export", run / "out", "--to", "csr", run / "model.csr")
    assert "csr" in rarefy("inspect", run / "model.csr").stdout
    rarefy("export", run / "out", "--to", "safetensors", run / "model.safetensors")
    result = rarefy("inspect", run / "model.safetensors")
    assert result.exit_code == 0
    assert "no parameter has a mask: this model is dense (--all shows it)" in result.stderr
    assert "whole model" in result.stdout


def test_inspect_says_when_groups_are_not_known(tmp_path: Path) -> None:
    _, model = checkpoint(tmp_path, TINY)
    params = configuration(tmp_path, {"sparsity": 0.5, "balance_out_groups": 3})
    path = save(tmp_path, 7, CheckpointParts(model.state_dict(), params=params))
    result = rarefy("inspect", path)
    assert result.exit_code == 0 and "body.weight" in result.stdout
    assert result.stderr.startswith(
        "Warning: patterns and the balance of groups are not shown: balance_out_groups: 3 is not"
    )


@pytest.mark.parametrize("name", ["none", "params.yaml"])
def test_inspect_of_what_is_no_checkpoint(tmp_path: Path, name: str) -> None:
    checkpoint(tmp_path, TINY)
    result = rarefy("inspect", tmp_path / name)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (2, "", 1)
    assert result.stderr.startswith(f"Error: {tmp_path / name}: ")
