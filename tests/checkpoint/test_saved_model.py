"""Models read without a trainer: from checkpoints, directories of them, and files of several kinds."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from rarefy.checkpoint.csr_file import encode_csr
from rarefy.checkpoint.directory import CheckpointParts, save
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.saved_model import SavedModel, open_saved
from rarefy.nn import SparseConv1D, SparseLinear


def sparse_state() -> dict[str, Tensor]:
    mask = torch.tensor([[True, False], [False, True]])
    return {"fc.weight": torch.ones(2, 2), "fc.weight_mask": mask, "fc.bias": torch.ones(2)}


def test_a_checkpoint(tmp_path: Path) -> None:
    path = save(tmp_path, 7, CheckpointParts(sparse_state(), params={"trainer": {"init": {}}}))
    saved = open_saved(path)
    assert (saved.path, saved.step, saved.storage) == (path, 7, "masked")
    assert saved.params == {"trainer": {"init": {}}}
    assert list(saved.masks) == ["fc.weight"]
    assert saved.dense["fc.weight"].tolist() == [[1.0, 0.0], [0.0, 1.0]]
    assert sorted(saved.dense) == ["fc.bias", "fc.weight"]


def test_the_newest_valid_checkpoint_of_a_directory(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (9, 10):
        save(tmp_path, step, CheckpointParts(sparse_state()))
    assert open_saved(tmp_path).step == 10
    (tmp_path / "checkpoint_10" / "MANIFEST.json").write_text("{")
    with caplog.at_level(logging.WARNING, "rarefy"):
        assert open_saved(tmp_path).step == 9
    assert "skipping checkpoint_10" in caplog.text


def test_a_checkpoint_that_is_damaged_or_incomplete(tmp_path: Path) -> None:
    path = save(tmp_path, 7, CheckpointParts(sparse_state()))
    (path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"model.safetensors: is damaged"):
        open_saved(path)
    (path / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint_7: has no MANIFEST.json"):
        open_saved(path)
    with pytest.raises(CheckpointError, match="holds no valid checkpoint; give a checkpoint_<step>"):
        open_saved(tmp_path)


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="none: does not exist; give a checkpoint_<step> directory or"):
        open_saved(tmp_path / "none")


def test_files(tmp_path: Path) -> None:
    state, path = sparse_state(), tmp_path / "file"
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, path)
    assert list(open_saved(path).masks) == ["fc.weight"]
    save_file(state, path)
    assert list(open_saved(path).masks) == ["fc.weight"]
    mask = state.pop("fc.weight_mask")
    path.write_bytes(b"".join(encode_csr(state, {"fc.weight": mask}, {})))
    saved = open_saved(path)
    assert saved.storage == "csr" and torch.equal(saved.masks["fc.weight"], mask)


@pytest.mark.parametrize("content", [b"", b"text", b"\x10\0\0\0\0\0\0\0{", b"\xff" * 8 + b"{}"])
def test_files_that_hold_no_model(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        open_saved(tmp_path / "file")
    assert "file: " in str(caught.value) and "\n" not in str(caught.value)


def test_tied_tensors_stay_one(tmp_path: Path) -> None:
    weight, mask = torch.ones(2, 2), torch.tensor([[True, False], [False, True]])
    state = {"embedding.weight": weight, "head.weight": weight, "head.weight_mask": mask}
    saved = open_saved(save(tmp_path, 1, CheckpointParts(state)))
    assert saved.tied == {"embedding.weight": "head.weight"}
    assert saved.dense["embedding.weight"] is saved.dense["head.weight"]
    assert saved.dense["head.weight"].count_nonzero() == 2


@pytest.mark.parametrize("kind", [SparseLinear, SparseConv1D])
def test_modules_with_compact_storage(tmp_path: Path, kind: type[SparseLinear]) -> None:
    torch.manual_seed(0)
    layer = kind(torch.rand(6, 4) < 0.5)
    saved = open_saved(save(tmp_path, 1, CheckpointParts(layer.state_dict())))
    assert torch.equal(saved.active("weight"), layer.weight_mask)
    assert sorted(saved.dense) == ["bias", "weight"]
    assert torch.equal(saved.dense["weight"], layer.weight.detach())


def test_connections_without_a_mask_are_the_nonzeros() -> None:
    saved = SavedModel(Path("x"), {"w": torch.tensor([0.0, 2.0]), "b": torch.tensor([True, False])})
    assert saved.active("w").tolist() == [False, True]
    assert saved.active("b").tolist() == [True, False]


@pytest.mark.parametrize("in_group", [False, True])
def test_a_weight_of_which_forward_passes_use_a_part_is_that_part(tmp_path: Path, in_group: bool) -> None:
    kept = {"fc.weight": {"forward": torch.tensor([False, True]), "aside": torch.tensor([3.0, 0.0])}}
    algorithm = {"algorithm": "top_kast", "connections": kept}
    state = {"sparsity": [{"algorithm": "static"}, algorithm] if in_group else algorithm}
    path = save(tmp_path, 7, CheckpointParts(sparse_state(), state=state))
    saved = open_saved(path)
    assert saved.masks["fc.weight"].tolist() == [[False, False], [False, True]]
    assert saved.dense["fc.weight"].tolist() == [[0.0, 0.0], [0.0, 1.0]]
