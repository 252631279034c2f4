"""The content of a checkpoint, cut off from the tensors that training goes on changing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import FileRecord, Manifest, version_of, write_file, write_manifest
from rarefy.checkpoint.nested import Json, split
from rarefy.checkpoint.packed import pack
from rarefy.checkpoint.tensor_file import encode_tensors, read_tensors, snapshot
from rarefy.disk import flush
from rarefy.distributed import Cut, is_cut, local_part, place

PART_NAMES = ("model", "optimizer", "state", "rng")
STATE_NAME = "state.json"
PARAMS_NAME = "params.yaml"
FILE_NAMES = (*(f"{part}.safetensors" for part in PART_NAMES), STATE_NAME, PARAMS_NAME)
# No name of a checkpoint begins so: a folder that is half written is never taken for one.
TEMPORARY_PREFIX = ".tmp-"


@dataclass
class CheckpointParts:
    """What a checkpoint holds.

    Args:
        model: the model's state dict, masks included.
        optimizer: nested dicts, lists, tuples, JSON values and tensors.
        state: the same; the trainer's counters, schedules, callbacks and data position.
        rng: generator states.
        params: the configuration, plain YAML values.
    """

    model: dict[str, Tensor]
    optimizer: Any = None
    state: Any = None
    rng: dict[str, Tensor] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frozen:
    """Everything that this process writes.

    Args:
        path: that the checkpoint is going to have.
        step: global step.
        tensors: by part and name; copies in CPU memory. Of a tensor that is cut over processes, the piece of this one.
        skeletons: by part, what is no tensor.
        params: the text of the configuration.
        cuts: by part and name, how a tensor is cut of which this process has a piece.
        is_shared: whether other processes hold pieces of it, or copies of what is one piece.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    skeletons: Mapping[str, Json]
    params: bytes
    cuts: Mapping[str, Mapping[str, Cut]]
    is_shared: bool

    @classmethod
    def of(cls, root: Path, step: int, parts: CheckpointParts) -> Frozen:
        """Copies what a checkpoint of these parts holds.

        Raises:
            CheckpointError: a value that cannot be stored.
        """
        path = Path(root) / f"checkpoint_{step}"
        skeletons: dict[str, Json] = {}
        tensors: dict[str, dict[str, Tensor]] = {}
        cuts: dict[str, dict[str, Cut]] = {}
        is_shared = False
        for part in PART_NAMES:
            try:
                skeletons[part], named = split(getattr(parts, part))
                tensors[part] = snapshot({name: local_part(tensor) for name, tensor in named.items()})
            except TypeError as error:
                raise unstorable(path, part, error) from error
            cuts[part] = {name: Cut.of(one) for name, one in named.items() if is_in_pieces(one)}
            is_shared |= place()[1] > 1 and any(map(is_cut, named.values()))
        return cls(path, step, tensors, skeletons, params_text(path, parts.params), cuts, is_shared)

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Writes the files of a checkpoint that this process writes alone, through to the disk."""
        texts = texts_of(self.step, self.skeletons, self.params)
        written = {name: write_file(folder / name, [text]) for name, text in texts.items()}
        return written | write_parts(folder, self.tensors)


def is_in_pieces(tensor: Tensor) -> bool:
    """Whether several processes hold a piece each.

    Example:
        >>> is_in_pieces(torch.ones(2))
        False
    """
    return is_cut(tensor) and Cut.of(tensor).pieces > 1


def unstorable(path: Path, part: str, problem: object) -> CheckpointError:
    """The error about a value that a checkpoint cannot hold."""
    remedy = "keep numbers, strings, None, lists, tuples, dicts and dense tensors there"
    return CheckpointError(path, f"cannot be saved: in {part}, {problem}", remedy)


def temporary_of(path: Path) -> Path:
    """Where a checkpoint is written before it is renamed.

    Example:
        >>> temporary_of(Path("run/checkpoint_3")).name
        '.tmp-checkpoint_3'
    """
    return path.with_name(f"{TEMPORARY_PREFIX}{path.name}")


def write_parts(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], rank: int = 0
) -> dict[str, FileRecord]:
    """Writes the tensors of a process, by part and name, through to the disk; they are contiguous, in CPU memory."""
    return {
        file_of(part, rank): write_file(folder / file_of(part, rank), encode_tensors(*pack(named)))
        for part, named in tensors.items()
        if rank == 0 or named
    }


def file_of(part: str, rank: int) -> str:
    """The file with the tensors of a part that a process writes.

    Example:
        >>> file_of("model", 0), file_of("model", 3)
        ('model.safetensors', 'model.00003.safetensors')
    """
    return f"{part}.safetensors" if rank == 0 else f"{part}.{rank:05d}.safetensors"


def files_of(path: Path, part: str, state: Mapping[str, Any]) -> list[Path]:
    """The files with the tensors of a part, by the rank of the process that wrote them.

    Args:
        path: a checkpoint.
        part: one of `PART_NAMES`.
        state: the content of its `state.json`.
    """
    files = [path / file_of(part, rank) for rank in range(state.get("writers", 1))]
    # Others have no file where they had nothing to write; the first must be missed where it is not there.
    return files[:1] + [file for file in files[1:] if file.exists()]


def complete(folder: Path, step: int, files: Mapping[str, FileRecord], writers: int = 1) -> None:
    """Writes the manifest of a folder in which all files are."""
    write_manifest(folder, Manifest(format_version=version_of(writers), step=step, files=dict(files)))
    flush(folder)


def read_pieces(path: Path, part: str, state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a part, whole, whichever processes wrote them.

    Args:
        path: a checkpoint.
        part: one of `PART_NAMES`.
        state: the content of its `state.json`.

    Raises:
        KeyError, ValueError: a file lacks what it should have.
    """
    files = [read_tensors(file) for file in files_of(path, part, state)]
    named = dict(files[0])
    for name, dimension in state.get("cuts", {}).get(part, {}).items():
        pieces = [one[name] for one in files if name in one]
        if not pieces:
            raise KeyError(name)
        named[name] = torch.cat(pieces, dim=dimension) if len(pieces) > 1 else pieces[0]
    return named


def params_text(path: Path, params: Mapping[str, Any]) -> bytes:
    """The configuration in YAML.

    Raises:
        CheckpointError: it holds what YAML cannot.
    """
    # Here, as whoever saves no checkpoint never needs it.
    import yaml

    try:
        return yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True).encode()
    except yaml.YAMLError as error:
        problem = f"cannot be saved: params hold what YAML cannot ({str(error).splitlines()[0]})"
        raise CheckpointError(path, problem, "keep plain values there") from error


def texts_of(
    step: int,
    skeletons: Mapping[str, Json],
    params: bytes,
    cuts: Mapping[str, Mapping[str, int]] | None = None,
    writers: int = 1,
) -> dict[str, bytes]:
    """The files that hold no tensors.

    Args:
        step: global step.
        skeletons: by part, what is no tensor.
        params: the text of the configuration.
        cuts: by part and name, the dimension along which a tensor is cut over files.
        writers: how many processes may have written files.
    """
    state = {"format_version": version_of(writers), "step": step, **skeletons}
    # Only then, so that a checkpoint of a whole model is one that older versions read.
    if writers > 1:
        state |= {"cuts": cuts, "writers": writers}
    # `split` has tagged infinities and NaN; a bare one would be no JSON to any other reader.
    return {STATE_NAME: json.dumps(state, indent=1, allow_nan=False).encode(), PARAMS_NAME: params}
