"""A checkpoint read in pieces: of each tensor no more than this process needs, whichever processes wrote it.

The rows of a packed tensor are found by its bits: how many entries come before them says where their values begin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from rarefy.checkpoint.packed import METADATA_KEY, bits_of, spread
from rarefy.checkpoint.writing.frozen import file_of
from rarefy.distributed import Cut

Wanted = Callable[[str, torch.Size], Cut | None]
"""Of a name and the whole shape of what a file has for it: how it is cut here, or None for the whole of it."""

# Bits that are only counted are read in parts of so many bytes.
_PART = 1 << 20


class Rows:
    """The tensors of one file, whole or some of their rows.

    Args:
        file: an open safetensors file.

    Attributes:
        shapes: by name, of the tensors as they were before they were packed.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._listed: dict[str, dict[str, Any]] = json.loads((file.metadata() or {}).get(METADATA_KEY, "{}"))
        parts = {part for row in self._listed.values() for part in (row["at"], row.get("values"))}
        names: list[str] = file.keys()
        plain = {name: file.get_slice(name).get_shape() for name in names if name not in parts}
        packed = {name: row["shape"] for name, row in self._listed.items()}
        self.shapes = {name: torch.Size(shape) for name, shape in {**plain, **packed}.items()}

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of a tensor of at least one dimension.

        Raises:
            KeyError, ValueError: the file lacks a part of it.
        """
        if name not in self._listed:
            return self._file.get_slice(name)[start:stop]
        row = self._listed[name]
        shape = torch.Size((stop - start, *row["shape"][1:]))
        inner = shape[1:].numel()
        before, active = self._active(row["at"], start * inner, stop * inner)
        # A mask, of which the bits are all.
        if "values" not in row:
            return active.view(shape)
        count = int(active.count_nonzero())
        return spread(self._file.get_slice(row["values"])[before : before + count], active).view(shape)

    def whole(self, name: str) -> Tensor:
        """All of a tensor."""
        if name not in self._listed:
            return self._file.get_tensor(name)
        shape = self.shapes[name]
        return self.read(name, 0, shape[0])

    def _active(self, name: str, start: int, stop: int) -> tuple[int, Tensor]:
        """How many entries come before some places, and bool for each of these places: whether there is one."""
        stored = self._file.get_slice(name)
        # Places, which `pack` lists in rising order; anything else are bits.
        if stored.get_dtype() != "U8":
            places = stored[:].long()
            first, last = torch.searchsorted(places, torch.tensor([start, stop])).tolist()
            active = torch.zeros(stop - start, dtype=torch.bool)
            active[places[first:last] - start] = True
            return first, active
        # Counted a part at a time: whole, the bits of a large weight would be unpacked to a byte each.
        before = sum(_ones(stored[one : min(one + _PART, start // 8)]) for one in range(0, start // 8, _PART))
        own = bits_of(stored[start // 8 : (stop + 7) // 8])
        into = start % 8
        return before + int(own[:into].count_nonzero()), own[into : into + stop - start]


def _ones(part: Tensor) -> int:
    return int(bits_of(part).count_nonzero())


def read_cut(path: Path, part: str, state: Mapping[str, Any], wanted: Wanted) -> dict[str, Tensor]:
    """The tensors of a part of a checkpoint: DTensors of which no more than the pieces here were read, others whole.

    Args:
        path: a checkpoint.
        part: one of `PART_NAMES`.
        state: the content of its `state.json`.
        wanted: how tensors are cut here.

    Raises:
        KeyError, ValueError: a file lacks what it should have.
    """
    cuts = state.get("cuts", {}).get(part, {})
    names = [file_of(part, rank) for rank in range(state["writers"] if cuts else 1)]
    with _opened([path / name for name in names]) as files:
        return {name: _read(files, name, cuts.get(name), wanted) for name in files[0].shapes}


@contextmanager
def _opened(paths: Sequence[Path]) -> Iterator[list[Rows]]:
    with ExitStack() as stack:
        yield [Rows(stack.enter_context(safe_open(path, "pt"))) for path in paths]


def _read(files: Sequence[Rows], name: str, dimension: int | None, wanted: Wanted) -> Tensor:
    """A tensor that is whole in the first file, or in pieces along a dimension in all."""
    owners = files[:1] if dimension is None else files
    along = dimension or 0
    shapes = [one.shapes[name] for one in owners]
    first = shapes[0]
    shape = torch.Size(
        [*first[:along], sum(one[along] for one in shapes), *first[along + 1 :]] if first else first
    )
    cut = wanted(name, shape) if shape else None
    if cut is None:
        pieces = [one.whole(name) for one in owners]
        return torch.cat(pieces, dim=along) if len(pieces) > 1 else pieces[0]
    if along or cut.dimension:
        # Rows alone lie one after the other in a file; of one tensor at a time the whole is there.
        whole = torch.cat([one.whole(name) for one in owners], dim=along)
        # A clone, or the piece would keep all of it in memory.
        return cut.wrap(cut.own(whole).clone().to(cut.device))
    return cut.wrap(_rows(owners, name, *cut.bounds).to(cut.device))


def _rows(owners: Sequence[Rows], name: str, start: int, stop: int) -> Tensor:
    """Rows of a tensor whose rows lie in several files, one after the other."""
    found = []
    offset = 0
    for one in owners:
        length = one.shapes[name][0]
        own = max(start - offset, 0), min(stop - offset, length)
        if own[0] < own[1]:
            found.append(one.read(name, *own))
        offset += length
    # A process whose piece is empty needs one of the right shape and dtype all the same.
    return torch.cat(found) if found else owners[0].read(name, 0, 0)
