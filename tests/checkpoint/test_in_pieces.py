"""A checkpoint of any number of writers, read in the pieces of any number of readers: no reader reads the whole."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import LoadPlan, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from rarefy.checkpoint.dcp import rows, storage_reader
from rarefy.checkpoint.dcp.part_reader import PartReader
from rarefy.checkpoint.in_pieces import read_cut
from rarefy.checkpoint.packed import METADATA_KEY, pack
from rarefy.checkpoint.tensor_file import encode_tensors, read_metadata
from rarefy.checkpoint.writing.frozen import file_of

ROWS, COLUMNS = 515, 131


@dataclass(frozen=True)
class Piece:
    """Equal pieces, of which the last may be short or empty."""

    shape: torch.Size
    reader: int
    readers: int
    dimension: int = 0

    @property
    def bounds(self) -> tuple[int, int]:
        size = self.shape[self.dimension]
        length = -(-size // self.readers)
        return min(self.reader * length, size), min((self.reader + 1) * length, size)

    def own(self, whole: Tensor) -> Tensor:
        start, stop = self.bounds
        return whole.narrow(self.dimension, start, stop - start)


class Into:
    """Stands for a planner: gives the places where a reader reads to."""

    def __init__(self, places: dict[str, Tensor]) -> None:
        self.places = places
        self.committed: list[str] = []

    def resolve_tensor(self, item: ReadItem) -> Tensor:
        place = self.places[item.dest_index.fqn]
        for dimension, (offset, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            place = place.narrow(dimension, offset, length)
        return place

    def commit_tensor(self, item: ReadItem, tensor: Tensor) -> None:
        self.committed.append(item.dest_index.fqn)


def read(folder: Path, reader: int, readers: int, dimension: int = 0) -> dict[str, tuple[Piece, Tensor]]:
    """What one of several readers gets of each tensor that can be cut so."""
    storage = PartReader(folder, "model")
    described: dict[str, Any] = dict(storage.read_metadata().state_dict_metadata)
    pieces = {
        name: Piece(one.size, reader, readers, dimension)
        for name, one in described.items()
        if len(one.size) > dimension
    }
    places = {}
    items = []
    for name, piece in pieces.items():
        start, stop = piece.bounds
        offsets = torch.Size(start if at == dimension else 0 for at in range(len(piece.shape)))
        sizes = torch.Size(stop - start if at == dimension else size for at, size in enumerate(piece.shape))
        places[name] = torch.zeros(sizes, dtype=described[name].properties.dtype)
        chunks = [ChunkStorageMetadata(offsets, sizes)]
        items += create_read_items_for_chunk_list(name, described[name], chunks)
    into: Any = Into(places)
    storage.read_data(LoadPlan(items), into).wait()
    assert set(into.committed) == {name for name, place in places.items() if place.numel()}
    return {name: (piece, places[name]) for name, piece in pieces.items()}


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


def write(folder: Path, named: dict[str, Tensor], writers: int, dimension: int = 0) -> None:
    """Writes the files of some writers, and what `state.json` says of them."""
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
    cuts = {"cuts": {"model": dict.fromkeys(cut, dimension)}, "writers": writers} if writers > 1 else {}
    (folder / "state.json").write_text(json.dumps({"format_version": 3, **cuts}))


@pytest.mark.parametrize("writers", [1, 2, 4])
@pytest.mark.parametrize("readers", [2, 3, 600])
def test_each_reader_gets_its_rows(tmp_path: Path, writers: int, readers: int) -> None:
    named = tensors()
    write(tmp_path, named, writers)
    listed = read_metadata(tmp_path / "model.safetensors").get("packed", "")
    # Of four writers each has so little that it stays as it is.
    assert all((f'"{name}"' in listed) == (writers < 4) for name in ("fc.weight", "fc.weight_mask", "few"))
    for reader in {0, 1, readers - 1}:
        found = read(tmp_path, reader, readers)
        assert found.keys() == named.keys() - {"step"}
        for name, (piece, own) in found.items():
            assert piece.shape == named[name].shape
            assert torch.equal(own, piece.own(named[name]))
            assert own.dtype == named[name].dtype


@pytest.mark.parametrize("writers", [1, 3])
def test_what_is_not_cut_here_is_whole(tmp_path: Path, writers: int) -> None:
    named = tensors()
    write(tmp_path, named, writers)
    found = read_cut(tmp_path, "model", lambda *_: None)
    assert found.keys() == named.keys()
    assert all(torch.equal(found[name], one) for name, one in named.items())


@pytest.mark.parametrize(("written", "read_along"), [(1, 0), (0, 1), (1, 1)])
def test_columns_are_cut_from_the_whole(tmp_path: Path, written: int, read_along: int) -> None:
    named = {name: one for name, one in tensors().items() if one.dim() == 2}
    write(tmp_path, named, 2, written)
    for name, (piece, own) in read(tmp_path, 1, 2, read_along).items():
        assert torch.equal(own, piece.own(named[name]))


def test_a_file_that_lacks_a_part_is_told(tmp_path: Path) -> None:
    write(tmp_path, {"dense": tensors()["dense"]}, 1)
    found = {"w.values": torch.ones(3), "w.bits": torch.full((4,), 255, dtype=torch.uint8)}
    metadata = {METADATA_KEY: json.dumps({"w": {"shape": [32], "at": "w.bits", "values": "w.values"}})}
    (tmp_path / "model.safetensors").write_bytes(b"".join(encode_tensors(found, metadata)))
    with pytest.raises(ValueError, match="3 values for 32 places"):
        read_cut(tmp_path, "model", lambda *_: None)


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
    write(tmp_path, named, writers)
    counts: list[int] = []
    opened = storage_reader.safe_open
    monkeypatch.setattr(storage_reader, "safe_open", lambda *given: Counting(opened(*given), counts))
    readers = 8
    for reader in range(readers):
        counts.clear()
        read(tmp_path, reader, readers)
        dense = named["dense"].numel() * 4 / readers
        values = named["fc.weight_mask"].count_nonzero() * 2 / readers
        bits = 2 * named["dense"].numel() / 8
        assert sum(counts) < 1.1 * (dense + values) + bits
        assert max(counts) < 1.1 * dense


def test_bits_are_counted_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_PART", 100)
    named = tensors()
    write(tmp_path, named, 1)
    piece, own = read(tmp_path, 2, 3)["fc.weight"]
    assert torch.equal(own, piece.own(named["fc.weight"]))
