"""The tensors of one file, of which rows can be read alone, packed ones too.

The rows of a packed tensor are found by its bits: how many entries come before them says where their values begin.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from rarefy.checkpoint.packed import METADATA_KEY, bits_of, spread
from rarefy.checkpoint.tensor_file import DTYPE_NAMES

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
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

    def dtype(self, name: str) -> torch.dtype:
        """Of a tensor as it was before it was packed.

        Raises:
            KeyError: the file holds something that rarefy never writes.
        """
        values = self._listed[name].get("values") if name in self._listed else name
        return torch.bool if values is None else _DTYPES[self._file.get_slice(values).get_dtype()]

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

    def region(self, name: str, offsets: torch.Size, lengths: torch.Size) -> Tensor:
        """A part of a tensor, a row of bounds for each dimension."""
        if not offsets:
            return self._file.get_tensor(name)
        found = self.read(name, offsets[0], offsets[0] + lengths[0])
        for dimension in range(1, len(offsets)):
            found = found.narrow(dimension, offsets[dimension], lengths[dimension])
        return found

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
