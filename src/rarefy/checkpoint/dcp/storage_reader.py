"""A checkpoint of rarefy as `torch.distributed.checkpoint.load` reads it: of each tensor the rows that are needed."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint import (
    LoadPlan,
    LoadPlanner,
    Metadata,
    ReadItem,
    StorageReader,
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.futures import Future

from rarefy.checkpoint.dcp.rows import Rows
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import MANIFEST_NAME, USE_ANOTHER, check_version, read_json, verify
from rarefy.checkpoint.nested import join
from rarefy.checkpoint.writing.frozen import FILE_NAMES, PART_NAMES, STATE_NAME, files_of


@dataclass(frozen=True)
class Stored:
    """Stands for a tensor: the part of the checkpoint that it is in, and its name there."""

    part: str
    name: str


class SparseStorageReader(StorageReader):
    """Reads a checkpoint of rarefy into what `torch.distributed.checkpoint.load` is given.

    The keys of its parts are those that torch makes of `{"model": model.state_dict(), "optimizer":
    optimizer.state_dict()}`; `state` and `rng` are there too. Tensors may be plain ones or DTensors of any mesh,
    whichever processes wrote the checkpoint; each process reads the rows that it needs. Sparse weights come as
    dense tensors, with zeros.

    Args:
        path: a `checkpoint_<step>` directory.
        check: whether each process compares all files with the SHA-256 in the manifest first.

    Example:
        >>> import tempfile, torch
        >>> from rarefy.checkpoint.directory import CheckpointParts, save
        >>> path = save(Path(tempfile.mkdtemp()), 3, CheckpointParts({"fc.weight": torch.eye(2)}))
        >>> state = {"model": {"fc.weight": torch.empty(2, 2)}}
        >>> torch.distributed.checkpoint.load(state, storage_reader=SparseStorageReader(path))
        >>> state["model"]["fc.weight"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    def __init__(self, path: str | PathLike[str], *, check: bool = True) -> None:
        self.path = Path(path)
        self.parts: Sequence[str] = PART_NAMES
        self._check = check
        self._listing: dict[str, Any] = {}
        self._owners: dict[tuple[Stored, torch.Size], Path] = {}

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Takes another path."""
        self.path = self.path if checkpoint_id is None else Path(checkpoint_id)

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """What there is, and in which pieces.

        Raises:
            CheckpointError: the checkpoint is damaged, or is none.
        """
        if self._check:
            verify(self.path, FILE_NAMES)
        state = read_json(self.path / STATE_NAME)
        check_version(self.path / STATE_NAME, state)
        try:
            found = {one: md for part in self.parts for one, md in self._pieces(part, state).items()}
            self._listing = self.listed(state, found)
        except (KeyError, ValueError, SafetensorError) as error:
            raise CheckpointError(self.path, f"does not fit {STATE_NAME} ({error})", USE_ANOTHER) from error
        return Metadata(
            {
                key: found[one] if isinstance(one, Stored) else BytesStorageMetadata()
                for key, one in self._listing.items()
            }
        )

    def listed(self, state: Mapping[str, Any], found: Iterable[Stored]) -> dict[str, Any]:
        """By the keys that torch asks for, a `Stored` for each tensor, and what is no tensor.

        Args:
            state: the content of `state.json`.
            found: the tensors in the files.
        """
        stored: dict[str, dict[str, Any]] = {part: {} for part in self.parts}
        for one in found:
            stored[one.part][one.name] = one
        return dict(_leaves({part: join(state[part], named) for part, named in stored.items()}))

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Nothing to do: every process has read the metadata."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Reads what the plan of this process asks for."""
        by_file: dict[Path, list[ReadItem]] = {}
        for item in plan.items:
            one = self._listing[item.storage_index.fqn]
            if isinstance(one, Stored):
                offset = item.storage_index.offset
                by_file.setdefault(self._owners[one, offset or torch.Size()], []).append(item)
            else:
                planner.load_bytes(item, _as_torch_saves(one))
        for path, items in by_file.items():
            with safe_open(path, "pt") as file:
                rows = Rows(file)
                for item in items:
                    self._read(rows, item, planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Whether a path is a checkpoint of rarefy."""
        return (Path(checkpoint_id) / MANIFEST_NAME).is_file()

    def _pieces(self, part: str, state: Mapping[str, Any]) -> dict[Stored, TensorStorageMetadata]:
        """The tensors in the files of a part."""
        cuts = state.get("cuts", {}).get(part, {})
        owners: dict[str, list[tuple[Path, Rows]]] = {}
        with ExitStack() as stack:
            for path in files_of(self.path, part, state):
                rows = Rows(stack.enter_context(safe_open(path, "pt")))
                for name in rows.shapes:
                    owners.setdefault(name, []).append((path, rows))
            return {
                Stored(part, name): self._piece(Stored(part, name), several, cuts.get(name, 0))
                for name, several in owners.items()
            }

    def _piece(
        self, stored: Stored, owners: Sequence[tuple[Path, Rows]], dimension: int
    ) -> TensorStorageMetadata:
        """A tensor whose pieces lie in several files, one after the other."""
        filled = [one for one in owners if one[1].shapes[stored.name].numel()] or owners[:1]
        chunks = []
        end = 0
        for path, rows in filled:
            shape = rows.shapes[stored.name]
            offsets = _along(dimension, end, [0] * len(shape))
            end += shape[dimension] if shape else 0
            chunks.append(ChunkStorageMetadata(offsets, shape))
            self._owners[stored, offsets] = path
        properties = TensorProperties(dtype=owners[0][1].dtype(stored.name))
        return TensorStorageMetadata(properties, _along(dimension, end, chunks[0].sizes), chunks)

    def _read(self, rows: Rows, item: ReadItem, planner: LoadPlanner) -> None:
        stored = self._listing[item.storage_index.fqn]
        own = rows.region(stored.name, item.storage_offsets, item.lengths)
        wanted = planner.resolve_tensor(item).detach()
        wanted.copy_(own)
        planner.commit_tensor(item, wanted)


def _along(dimension: int, number: int, others: Sequence[int]) -> torch.Size:
    """Numbers of which one is another."""
    return torch.Size(number if index == dimension else one for index, one in enumerate(others))


def _leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """What torch takes for the leaves of a nested value, by its names for them."""
    if isinstance(value, Mapping):
        items = list(value.items())
    elif _has_leaves(value):
        items = list(enumerate(value))
    else:
        yield place, value
        return
    for key, one in items:
        yield from _leaves(one, f"{place}.{key}" if place else str(key))


def _has_leaves(value: Any) -> bool:
    """Whether torch looks into it: a list in which there is a tensor or a mapping somewhere."""
    return isinstance(value, list) and any(
        isinstance(one, Mapping | Stored) or _has_leaves(one) for one in value
    )


def _as_torch_saves(value: Any) -> io.BytesIO:
    """The form in which planners take what is no tensor; in memory, as the file has JSON."""
    content = io.BytesIO()
    torch.save(value, content)
    content.seek(0)
    return content
