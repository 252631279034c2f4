"""The tensors of one part of a checkpoint, by the names that they have in its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rarefy.checkpoint.dcp.storage_reader import SparseStorageReader, Stored


class PartReader(SparseStorageReader):
    """Reads one part; a tensor that is tied is there once.

    Args:
        path: a checkpoint, whose files have been verified.
        part: one of `PART_NAMES`.
    """

    def __init__(self, path: Path, part: str) -> None:
        super().__init__(path, check=False)
        self.parts = (part,)

    def listed(self, state: Mapping[str, Any], found: Iterable[Stored]) -> dict[str, Any]:
        """The tensors of the part."""
        return {one.name: one for one in found}
