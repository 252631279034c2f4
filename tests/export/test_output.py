"""What is written appears whole or not at all, and replaces nothing that was not meant."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import pytest
import torch

from full_disks import full_disk
from rarefy.errors import ConfigError, RarefyError
from rarefy.export import FORMATS, SavedModel, export
from rarefy.export.output import check_free, write
from saved_models import GPT, checkpoint


def saved(value: float = 1.0) -> SavedModel:
    return SavedModel(Path("run"), {"w": torch.full((9, 9), value), "w_mask": torch.eye(9).bool()})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("to", ["dense", "safetensors", "csr", "hf"])
def test_a_full_disk_leaves_no_half_file(tmp_path: Path, to: str) -> None:
    if to == "hf":
        pytest.importorskip("transformers")
    path, _ = checkpoint(tmp_path / "run", GPT)
    (tmp_path / "out").mkdir()
    with full_disk(), pytest.raises(RarefyError, match=r"exported: cannot be written: .*File too large"):
        export(path, to, tmp_path / "out" / "exported")
    assert names_in(tmp_path / "out") == []


def test_a_failure_keeps_what_was_there(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    (tmp_path / "out").write_text("old")
    with pytest.raises(RarefyError, match="out: cannot be written: No space left on device; free space"):
        write(tmp_path / "out", fill)
    assert (tmp_path / "out").read_text() == "old"
    assert names_in(tmp_path) == ["out"]


def test_folders_above_are_made(tmp_path: Path) -> None:
    export(saved(), "dense", tmp_path / "a" / "b" / "model.pt")
    assert names_in(tmp_path / "a" / "b") == ["model.pt"]
    with pytest.raises(RarefyError, match=r"cannot be written: (Not a directory|File exists)"):
        export(saved(), "dense", tmp_path / "a" / "b" / "model.pt" / "c")


def test_a_file_is_replaced_with_force_only(tmp_path: Path) -> None:
    out = tmp_path / "model.pt"
    export(saved(), "dense", out)
    before = out.read_bytes()
    with pytest.raises(RarefyError, match=r"model.pt: exists already; give another path, or --force to"):
        export(saved(2.0), "dense", out)
    assert out.read_bytes() == before
    export(saved(2.0), "dense", out, force=True)
    assert torch.load(out, weights_only=True)["w"].max() == 2


def test_what_force_does_not_replace(tmp_path: Path) -> None:
    folder, file = tmp_path / "folder", tmp_path / "file"
    folder.mkdir()
    file.touch()
    with pytest.raises(RarefyError, match="a file is to be written, but this is a folder"):
        check_free(folder, is_folder=False, force=True)
    with pytest.raises(RarefyError, match="a folder is to be written, but this is a file"):
        check_free(file, is_folder=True, force=True)
    check_free(folder, is_folder=True, force=True)
    (folder / "thesis.txt").touch()
    with pytest.raises(RarefyError, match=r"has other things than a model in it \(no config.json\)"):
        check_free(folder, is_folder=True, force=True)
    (folder / "config.json").touch()
    check_free(folder, is_folder=True, force=True)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        path.mkdir()
        (path / "new").write_text("123")

    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    assert write(tmp_path / "out", fill) == 3
    assert names_in(tmp_path / "out") == ["new"]
    assert names_in(tmp_path) == ["out"]


def test_a_checkpoint_is_not_written_into(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, GPT)
    for out in (path / "model.safetensors", path / "sub" / "new"):
        with pytest.raises(RarefyError, match="is inside the checkpoint, which must stay as it is"):
            export(path, "safetensors", out, force=True)


def test_no_other_checkpoint_and_not_the_source_is_written_over(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, GPT)
    source = path / "model.safetensors"
    with pytest.raises(RarefyError, match="is what is exported, which must stay as it is"):
        export(source, "safetensors", source, force=True)
    (path.parent / "config.json").touch()  # as a folder has that --force may replace
    with pytest.raises(RarefyError, match="holds what is exported, which must stay as it is"):
        export(source, "hf", path.parent, force=True)
    other = tmp_path / "other" / "checkpoint_3"
    shutil.copytree(path, other)
    with pytest.raises(RarefyError, match="is inside the checkpoint, which must stay as it is"):
        export(source, "safetensors", other / "model.safetensors", force=True)
    assert (other / "model.safetensors").read_bytes() == source.read_bytes()


def test_an_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        export(saved(), "safetensor", tmp_path / "out")
    assert "--to: 'safetensor' is not allowed" in str(caught.value)
    assert "did you mean safetensors?" in str(caught.value)
    assert all(name in str(caught.value) for name in FORMATS)


def test_a_folder_and_the_names_in_it_reach_the_disk(tmp_path, monkeypatch):
    flushed: list[str] = []
    monkeypatch.setattr("rarefy.export.output.flush", lambda path: flushed.append(path.name))

    def fill(path: Path) -> None:
        (path / "inner").mkdir(parents=True)
        (path / "inner" / "a").write_text("four")

    assert write(tmp_path / "out", fill) == 4
    assert sorted(flushed[:-1]) == ["a", "inner", "made"] and flushed[-1] == tmp_path.name
