"""`torch.distributed.checkpoint.save` into a checkpoint of rarefy: safetensors and JSON, hashed, and one rename.

torch plans which process writes which piece, and exchanges what was written. Where its own writers keep a pickle, of
the plan and of what is no tensor, is JSON here.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from os import PathLike
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata, SavePlan, SavePlanner, StorageWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import FileRecord, write_file
from rarefy.checkpoint.nested import Json, split
from rarefy.checkpoint.tensor_file import in_memory
from rarefy.checkpoint.writing.folders import (
    DIRECTORY_NAME,
    clear_leftovers,
    delete_old,
    only_writer,
    publish,
)
from rarefy.checkpoint.writing.frozen import (
    PART_NAMES,
    complete,
    params_text,
    temporary_of,
    texts_of,
    unstorable,
    write_parts,
)

_EMPTY: Mapping[str, Any] = {"model": {}, "optimizer": None, "state": None, "rng": {}}


class SparseStorageWriter(StorageWriter):
    """Writes what `torch.distributed.checkpoint.save` or `async_save` is given as a checkpoint of rarefy.

    Of `{"model": model.state_dict(), "optimizer": optimizer.state_dict()}` both become parts of it, and any other
    keys its `state`. Tensors with many zeros are packed. `rarefy inspect`, `rarefy export` and
    `SparseStorageReader` read it.

    Args:
        path: the `checkpoint_<step>` directory to be, the same for all processes; one that is there is replaced.
        keep_last: afterwards delete all checkpoints beside it but the newest so many, ≥ 1; None keeps all.

    Raises:
        CheckpointError: the path has another name.

    Example:
        >>> import tempfile, torch
        >>> path = Path(tempfile.mkdtemp()) / "checkpoint_3"
        >>> state = {"model": {"fc.weight": torch.eye(2)}, "optimizer": {"lr": 0.1}}
        >>> _ = torch.distributed.checkpoint.save(state, storage_writer=SparseStorageWriter(path))
        >>> sorted(file.name for file in path.iterdir())[:3]
        ['MANIFEST.json', 'model.safetensors', 'optimizer.safetensors']
    """

    def __init__(self, path: str | PathLike[str], *, keep_last: int | None = None) -> None:
        self.reset(path)
        self._keep_last = keep_last
        # What the first process has to end: the lock, and after a failure the folder.
        self._open = ExitStack()
        self._cuts: dict[str, dict[str, int]] = {}
        self._writers = 1

    def reset(self, checkpoint_id: str | PathLike[str] | None = None) -> None:
        """Takes another path.

        Raises:
            CheckpointError: it is not named like a checkpoint.
        """
        if checkpoint_id is None:
            return
        self.path = Path(checkpoint_id)
        named = DIRECTORY_NAME.fullmatch(self.path.name)
        if not named or named[2]:
            raise CheckpointError(self.path, "is no name of a checkpoint", "give …/checkpoint_<step>")
        self.step = int(named[1])

    def set_up_storage_writer(self, is_coordinator: bool, *_: Any, **__: Any) -> None:
        """Lets go of what a save that failed has left, so that the writer may try again.

        The first process makes the folder when all have come with their plans.
        """
        self.close()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Makes the folder, and tells each process which one it is.

        Raises:
            CheckpointError: a tensor is cut in a way that files cannot say.
            OSError: the folder cannot be made.
        """
        self._cuts, self._writers = _cuts(self.path, plans)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._open.enter_context(only_writer(self.path.parent))
        clear_leftovers(self.path.parent)
        folder = temporary_of(self.path)
        folder.mkdir()
        self._open.callback(shutil.rmtree, folder, ignore_errors=True)
        return [replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes the pieces of this process through to the disk.

        Raises:
            CheckpointError: something cannot be stored, or the folder is not seen here.
            OSError: the file system refuses.
        """
        folder = temporary_of(self.path)
        if not folder.is_dir():
            problem = "cannot be written: this process does not see the folder that the first one made"
            raise CheckpointError(self.path, problem, "give a folder that all processes see")
        tensors: dict[str, dict[str, Tensor]] = {part: {} for part in PART_NAMES}
        results = []
        for item in plan.items:
            part, name = _placed(self.path, item.index.fqn)
            if item.type == WriteItemType.BYTE_IO:
                results.append(WriteResult(item.index, 0, self._value(item, planner)))
            else:
                tensors[part][name] = self._tensor(item, planner)
        written = write_parts(folder, tensors, plan.storage_data)
        results += [WriteResult(MetadataIndex(name), one.size, one) for name, one in written.items()]
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Writes what is no tensor and the manifest, and gives the folder its name.

        Raises:
            CheckpointError, OSError: it cannot.
        """
        folder = temporary_of(self.path)
        done = list(chain(*results))
        files = {one.index.fqn: one.storage_data for one in done if isinstance(one.storage_data, FileRecord)}
        values = {
            one.index.fqn: one.storage_data for one in done if not isinstance(one.storage_data, FileRecord)
        }
        texts = self.texts(metadata, values, self._cuts, self._writers)
        files |= {name: write_file(folder / name, [text]) for name, text in texts.items()}
        complete(folder, self.step, files, self._writers)
        publish(folder, self.path)
        delete_old(self.path.parent, self.path, self._keep_last)
        self.close()

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | PathLike[str]) -> bool:
        """Whether a path is named like a checkpoint of rarefy."""
        return DIRECTORY_NAME.fullmatch(Path(checkpoint_id).name) is not None

    def texts(
        self,
        metadata: Metadata,
        values: Mapping[str, Any],
        cuts: Mapping[str, Mapping[str, int]],
        writers: int,
    ) -> dict[str, bytes]:
        """The files that hold no tensors.

        Args:
            metadata: what torch planned.
            values: by key, what is no tensor.
            cuts: by part and name, the dimension along which a tensor is cut.
            writers: how many processes may have written a file.

        Raises:
            CheckpointError: a value cannot be stored.
        """
        paths = metadata.planner_data or {}
        leaves = {
            tuple(paths.get(key, _placed(self.path, key))): values.get(key, torch.empty(0))
            for key in metadata.state_dict_metadata
        }
        nested = {**_EMPTY, **_nested(leaves)}
        found = {part: self._split(part, nested[part]) for part in PART_NAMES}
        known = metadata.state_dict_metadata.keys()
        hidden = [f"{part}.{name}" for part, (_, named) in found.items() for name in named]
        if unknown := sorted(set(hidden) - known):
            raise CheckpointError(self.path, f"cannot be saved: {unknown[0]} is in a tuple", "give a list")
        skeletons = {part: skeleton for part, (skeleton, _) in found.items()}
        return texts_of(self.step, skeletons, params_text(self.path, {}), cuts, writers)

    def close(self) -> None:
        """Lets others write; what was begun and failed goes."""
        self._open.close()

    def _split(self, part: str, value: Any) -> tuple[Json, dict[str, Tensor]]:
        try:
            return split(value)
        except TypeError as error:
            raise unstorable(self.path, part, error) from error

    def _tensor(self, item: WriteItem, planner: SavePlanner) -> Tensor:
        part, name = _placed(self.path, item.index.fqn)
        found: Any = planner.resolve_data(item)
        try:
            return in_memory(name, found.detach())
        except TypeError as error:
            raise unstorable(self.path, part, error) from error

    def _value(self, item: WriteItem, planner: SavePlanner) -> Any:
        content: Any = planner.resolve_data(item)
        content.seek(0)
        try:
            return torch.load(content, weights_only=True)
        except UnpicklingError as error:
            part, name = _placed(self.path, item.index.fqn)
            raise unstorable(self.path, part, f"{name} is no plain value") from error


def _placed(path: Path, key: str) -> tuple[str, str]:
    """The part of a checkpoint that a key belongs to, and its name there."""
    part, _, name = key.partition(".")
    if part not in PART_NAMES or not name:
        remedy = 'give {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": {…}}'
        raise CheckpointError(path, f"has no place for {key}", remedy)
    return part, name


def _cuts(path: Path, plans: Sequence[SavePlan]) -> tuple[dict[str, dict[str, int]], int]:
    """By part and name the dimension along which tensors are cut over files, and how many files there may be."""
    pieces: dict[str, list[tuple[int, Any]]] = {}
    for rank, plan in enumerate(plans):
        for item in plan.items:
            if item.tensor_data is not None:
                pieces.setdefault(item.index.fqn, []).append((rank, item.tensor_data))
    cuts: dict[str, dict[str, int]] = {part: {} for part in PART_NAMES}
    for key, found in pieces.items():
        part, name = _placed(path, key)
        dimensions = {dimension for _, one in found for dimension in _cut_dimensions(one)}
        filled = [(rank, tuple(one.chunk.offsets)) for rank, one in found if one.chunk.sizes.numel()]
        # The files of a tensor are read one after the other.
        if len(dimensions) > 1 or len(dict(filled)) < len(filled) or filled != sorted(filled, key=_by_offset):
            problem = f"cannot be saved: {key} is not cut along one dimension, piece after piece"
            remedy = (
                "give planner=DefaultSavePlanner(dedup_save_to_lowest_rank=True) where several processes hold "
                "the same piece; cut as fully_shard does, or save it whole"
            )
            raise CheckpointError(path, problem, remedy)
        if dimensions or found[0][0] > 0:
            cuts[part][name] = min(dimensions, default=0)
    return cuts, 1 + max((rank for found in pieces.values() for rank, _ in found), default=0)


def _cut_dimensions(one: TensorWriteData) -> Iterator[int]:
    return (dimension for dimension, size in enumerate(one.size) if one.chunk.sizes[dimension] != size)


def _by_offset(piece: tuple[int, tuple[int, ...]]) -> tuple[int, ...]:
    return piece[1]


def _nested(leaves: Mapping[tuple[str | int, ...], Any]) -> Any:
    """Dicts and lists from the paths to their leaves."""
    if () in leaves:
        return leaves[()]
    groups: dict[str | int, dict[tuple[str | int, ...], Any]] = {}
    for path, leaf in leaves.items():
        groups.setdefault(path[0], {})[path[1:]] = leaf
    built = {key: _nested(below) for key, below in groups.items()}
    if not built or not all(isinstance(key, int) for key in built):
        return built
    # torch names no leaf of an empty dict; without its place, all that come after it would have another.
    return [built.get(index, {}) for index in range(1 + max(map(int, built)))]
