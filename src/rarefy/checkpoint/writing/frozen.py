"""The content of a checkpoint, cut off from the tensors that training goes on changing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
        texts: by the name of their file; of the first process only.
        cuts: by part and name, the dimension along which a tensor is cut.
        rank: of this process.
        writers: how many processes hold different pieces.
    """

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, bytes]
    cuts: Mapping[str, Mapping[str, int]]
    rank: int = 0
    writers: int = 1

    @classmethod
    def of(cls, root: Path, step: int, parts: CheckpointParts) -> Frozen:
        """Copies what a checkpoint of these parts holds.

        Raises:
            CheckpointError: a value that cannot be stored.
        """
        path = Path(root) / f"checkpoint_{step}"
        skeletons: dict[str, Json] = {}
        tensors = {}
        cuts = {}
        for part in PART_NAMES:
            try:
                skeletons[part], named = split(getattr(parts, part))
                tensors[part] = snapshot({name: local_part(tensor) for name, tensor in named.items()})
            except TypeError as error:
                remedy = "keep numbers, strings, None, lists, tuples, dicts and dense tensors there"
                raise CheckpointError(path, f"cannot be saved: in {part}, {error}", remedy) from error
            cuts[part] = {name: Cut.of(one).dimension for name, one in named.items() if is_cut(one)}
        writers = max((_pieces(one) for one in _cut_tensors(parts)), default=1)
        # What is not cut is saved by a single process, which then writes everything.
        rank = place()[0] if writers > 1 else 0
        if rank > 0:
            # What is not cut is the same in every process, and the first one writes it.
            tensors = {part: {n: t for n, t in tensors[part].items() if n in cuts[part]} for part in tensors}
        if writers > 1:
            # Only then, so that a checkpoint of a whole model is one that older versions read.
            skeletons |= {"cuts": cuts, "writers": writers}
        return cls(path, step, tensors, _texts(path, step, skeletons, parts.params), cuts, rank, writers)

    @property
    def temporary(self) -> Path:
        """Where it is written before it is renamed."""
        return self.path.with_name(f"{TEMPORARY_PREFIX}{self.path.name}")

    @property
    def version(self) -> int:
        """The format that it is written in: the oldest that can hold it."""
        return version_of(self.writers)

    def write(self, folder: Path) -> dict[str, FileRecord]:
        """Writes the files of this process through to the disk."""
        chunks: dict[str, Iterable[bytes | memoryview]] = {}
        if self.rank == 0:
            chunks = {name: [text] for name, text in self.texts.items()}
        for part, named in self.tensors.items():
            if self.rank == 0 or named:
                chunks[file_of(part, self.rank)] = encode_tensors(*pack(named))
        return {name: write_file(folder / name, content) for name, content in chunks.items()}


def _cut_tensors(parts: CheckpointParts) -> Iterable[Tensor]:
    return (tensor for tensor in parts.model.values() if is_cut(tensor))


def _pieces(tensor: Tensor) -> int:
    cut = Cut.of(tensor)
    return cut.mesh.size(cut.mesh_dimension)


def file_of(part: str, rank: int) -> str:
    """The file with the tensors of a part that a process writes.

    Example:
        >>> file_of("model", 0), file_of("model", 3)
        ('model.safetensors', 'model.00003.safetensors')
    """
    return f"{part}.safetensors" if rank == 0 else f"{part}.{rank:05d}.safetensors"


def complete(folder: Path, frozen: Frozen, files: Mapping[str, FileRecord]) -> None:
    """Writes the manifest of a folder in which all files are."""
    write_manifest(folder, Manifest(format_version=frozen.version, step=frozen.step, files=dict(files)))
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
    named = read_tensors(path / file_of(part, 0))
    cuts = state.get("cuts", {}).get(part, {})
    if cuts:
        others = [read_tensors(path / file_of(part, rank)) for rank in range(1, state["writers"])]
        for name, dimension in cuts.items():
            named[name] = torch.cat([named[name], *(other[name] for other in others)], dim=dimension)
    return named


def _texts(path: Path, step: int, skeletons: Json, params: dict[str, Any]) -> dict[str, bytes]:
    # Here, as whoever saves no checkpoint never needs it.
    import yaml

    version = version_of(skeletons.get("writers", 1))
    state = {"format_version": version, "step": step, **skeletons}
    try:
        yaml_text = yaml.safe_dump(params, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        problem = f"cannot be saved: params hold what YAML cannot ({str(error).splitlines()[0]})"
        raise CheckpointError(path, problem, "keep plain values there") from error
    # `split` has tagged infinities and NaN; a bare one would be no JSON to any other reader.
    state_text = json.dumps(state, indent=1, allow_nan=False)
    return {STATE_NAME: state_text.encode(), PARAMS_NAME: yaml_text.encode()}
