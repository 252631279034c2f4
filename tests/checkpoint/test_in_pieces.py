"""A checkpoint of any number of writers, read in the pieces of any number of readers: no reader reads the whole."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.checkpoint import in_pieces
from rarefy.checkpoint.in_pieces import read_cut
from rarefy.checkpoint.packed import pack
from rarefy.checkpoint.tensor_file import encode_tensors, read_metadata
from rarefy.checkpoint.writing.frozen import file_of

ROWS, COLUMNS = 515, 131


@dataclass(frozen=True)
class Piece:
    """Stands for a `Cut`: equal pieces, of which the last may be short or empty; wrapped by a note of its bounds."""

    shape: torch.Size
    reader: int
    readers: int
    dimension: int = 0
    device: str = "cpu"

    @property
    def bounds(self) -> tuple[int, int]:
        size = self.shape[self.dimension]
        length = -(-size // self.readers)
        return min(self.reader * length, size), min((self.reader + 1) * length, size)

    def own(self, whole: Tensor) -> Tensor:
        start, stop = self.bounds
        return whole.narrow(self.dimension, start, stop - start)

    def wrap(self, piece: Tensor) -> Any:
        return self, piece


def tensors() -> dict[str, Tensor]:
    """Packed by bits, by places, with a support of its own; and what is not packed."""
    drawn = torch.Generator().manual_seed(0)
    uniform = torch.rand(ROWS, COLUMNS, generator=drawn)
    mask = uniform < 0.1
    return {
        "fc.weight": (uniform * mask).bfloat16(),
        "fc.weight_mask": mask,
        "few": torch.where(uniform < 0.01, uniform, 0),
        "dense": uniform,
        "bias": torch.arange(7),
        "short": torch.arange(6).view(2, 3),
        "step": torch.tensor(3.0),
    }


def write(folder: Path, named: dict[str, Tensor], writers: int, dimension: int = 0) -> dict[str, Any]:
    """Writes the files of some writers; returns what `state.json` says of them."""
    cut = [name for name, one in named.items() if one.dim() > dimension and name != "bias"]
    for writer in range(writers):
        own = {
            name: Piece(named[name].shape, writer, writers, dimension).own(named[name]).contiguous()
            for name in cut
        }
        if writer == 0:
            own = {**named, **own}
        data = b"".join(encode_tensors(*pack(own)))
        (folder / file_of("model", writer)).write_bytes(data)
    return {"cuts": {"model": dict.fromkeys(cut, dimension)}, "writers": writers} if writers > 1 else {}


@pytest.mark.parametrize("writers", [1, 2, 4])
@pytest.mark.parametrize("readers", [2, 3, 600])
def test_each_reader_gets_its_rows(tmp_path: Path, writers: int, readers: int) -> None:
    named = tensors()
    state = write(tmp_path, named, writers)
    listed = read_metadata(tmp_path / "model.safetensors").get("packed", "")
    # Of four writers each has so little that it stays as it is.
    assert all((f'"{name}"' in listed) == (writers < 4) for name in ("fc.weight", "fc.weight_mask", "few"))
    for reader in {0, 1, readers - 1}:
        found: Any = read_cut(
            tmp_path, "model", state, lambda _, shape, reader=reader: Piece(shape, reader, readers)
        )
        assert found.keys() == named.keys()
        assert torch.equal(found.pop("step"), named["step"])
        for name, (piece, own) in found.items():
            assert piece.shape == named[name].shape
            assert torch.equal(own, piece.own(named[name]))
            assert own.dtype == named[name].dtype


@pytest.mark.parametrize("writers", [1, 3])
def test_what_is_not_cut_here_is_whole(tmp_path: Path, writers: int) -> None:
    named = tensors()
    found = read_cut(tmp_path, "model", write(tmp_path, named, writers), lambda *_: None)
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], one) for name, one in named.items())


@pytest.mark.parametrize(("written", "read"), [(1, 0), (0, 1), (1, 1)])
def test_columns_are_cut_from_the_whole(tmp_path: Path, written: int, read: int) -> None:
    named = {name: one for name, one in tensors().items() if one.dim() == 2}
    state = write(tmp_path, named, 2, written)
    found: Any = read_cut(tmp_path, "model", state, lambda _, shape: Piece(shape, 1, 2, read))
    for name, (piece, own) in found.items():
        assert torch.equal(own, piece.own(named[name]))
        assert own.untyped_storage().nbytes() <= own.numel() * own.element_size()


class Counting:
    """An open file that counts the bytes it hands out."""

    def __init__(self, opened: Any, counts: list[int]) -> None:
        self.opened = opened
        self.counts = counts

    def __enter__(self) -> Any:
        self.file = self.opened.__enter__()
        return self

    def __exit__(self, *reason: Any) -> None:
        self.opened.__exit__(*reason)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def get_slice(self, name: str) -> Any:
        return CountingSlice(self.file.get_slice(name), self.counts)


class CountingSlice:
    def __init__(self, part: Any, counts: list[int]) -> None:
        self.part = part
        self.counts = counts

    def __getattr__(self, name: str) -> Any:
        return getattr(self.part, name)

    def __getitem__(self, place: slice) -> Tensor:
        found = self.part[place]
        self.counts.append(found.numel() * found.element_size())
        return found


@pytest.mark.parametrize("writers", [1, 2])
def test_no_more_is_read_than_needed(tmp_path: Path, writers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    named = {name: tensors()[name] for name in ("fc.weight", "fc.weight_mask", "dense")}
    state = write(tmp_path, named, writers)
    counts: list[int] = []
    opened = in_pieces.safe_open
    monkeypatch.setattr(in_pieces, "safe_open", lambda *given: Counting(opened(*given), counts))
    readers = 8
    for reader in range(readers):
        counts.clear()
        read_cut(tmp_path, "model", state, lambda _, shape, reader=reader: Piece(shape, reader, readers))
        dense = named["dense"].numel() * 4 / readers
        values = named["fc.weight_mask"].count_nonzero() * 2 / readers
        bits = 2 * named["dense"].numel() / 8
        assert sum(counts) < 1.1 * (dense + values) + bits
        assert max(counts) < 1.1 * dense


def test_bits_are_counted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_pieces, "_PART", 100)
    named = tensors()
    found: Any = read_cut(tmp_path, "model", write(tmp_path, named, 1), lambda _, shape: Piece(shape, 2, 3))
    assert torch.equal(found["fc.weight"][1], Piece(named["fc.weight"].shape, 2, 3).own(named["fc.weight"]))
