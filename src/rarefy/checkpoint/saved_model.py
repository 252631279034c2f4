"""The model in a checkpoint or a file, read without a trainer and without running any code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rarefy.checkpoint.chosen import checkpoint_at
from rarefy.checkpoint.csr_file import is_csr, load_csr
from rarefy.checkpoint.directory import load
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.foreign import load_foreign
from rarefy.checkpoint.mask_names import mask_names
from rarefy.checkpoint.matching import dense_state, in_weight
from rarefy.checkpoint.tensor_file import read_tensors
from rarefy.checkpoint.writing.folders import DIRECTORY_NAME

HEADER_LENGTH_BYTES = 8


@dataclass(frozen=True)
class SavedModel:
    """A model's weights and masks, and what is known of the run that made them.

    Args:
        path: the checkpoint or file.
        state: tensors by name, masks included, in CPU memory.
        params: the configuration of the run; empty if unknown.
        step: global step; None if unknown.
        storage: how the file holds sparse weights: `masked` or `csr`.
    """

    path: Path
    state: dict[str, Tensor]
    params: dict[str, Any] = field(default_factory=dict)
    step: int | None = None
    storage: str = "masked"

    @cached_property
    def masks(self) -> dict[str, Tensor]:
        """Sparse parameter → its mask, bool."""
        return {name: self.state[mask].bool() for name, mask in mask_names(self.state).items()}

    @cached_property
    def tied(self) -> dict[str, str]:
        """Further names of a tensor → the name that stands for it, the one with a mask if there is one."""
        names: dict[Any, list[str]] = {}
        for name, tensor in self.state.items():
            # Empty tensors all have the address 0.
            if tensor.numel():
                view = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
                names.setdefault(view, []).append(name)
        chosen = {
            min(several, key=lambda name: name not in self.masks): several for several in names.values()
        }
        return {other: name for name, several in chosen.items() for other in several if other != name}

    @cached_property
    def dense(self) -> dict[str, Tensor]:
        """The state dict without masks: exact zeros at inactive connections, tied tensors still one."""
        state = dense_state(self.state, self.masks)
        return {name: state[self.tied.get(name, name)] for name in state}

    def active(self, name: str) -> Tensor:
        """The active connections of a weight, bool; without a mask those that are not zero."""
        return self.masks[name] if name in self.masks else self.state[name] != 0


def open_saved(path: Path) -> SavedModel:
    """Reads a model.

    Args:
        path: a `checkpoint_{step}` directory, a directory of checkpoints (the newest valid one is taken), a
            safetensors file, or a `.pt` or `.mdl` file, which is loaded with `weights_only`.

    Raises:
        CheckpointError: it does not exist, is damaged, or holds no model.

    Example:
        >>> import tempfile, torch
        >>> file = Path(tempfile.mkdtemp()) / "model.pt"
        >>> torch.save({"fc.weight": torch.ones(2, 2), "fc.weight_mask": torch.eye(2).bool()}, file)
        >>> open_saved(file).dense["fc.weight"].tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    if not path.exists():
        raise CheckpointError(path, "does not exist", "give a checkpoint_<step> directory or a model_dir")
    if not path.is_dir():
        return _open_file(path)
    return _open_checkpoint(checkpoint_at(path))


def _open_checkpoint(path: Path) -> SavedModel:
    parts = load(path, only=("model", "state"))
    named = DIRECTORY_NAME.fullmatch(path.resolve().name)
    state = {**parts.model, **dict(_used_masks(parts.model, parts.state))}
    return SavedModel(path, state, parts.params or {}, int(named[1]) if named else None)


def _used_masks(model: Mapping[str, Tensor], state: Any) -> Iterator[tuple[str, Tensor]]:
    """The masks of weights of which forward passes use a part, as they use it: what is trained beside is no model."""
    names = mask_names(model)
    sparsity = state.get("sparsity") if isinstance(state, Mapping) else None
    for algorithm in sparsity if isinstance(sparsity, list) else [sparsity or {}]:
        for weight, kept in algorithm.get("connections", {}).items():
            if "forward" in kept and weight in names:
                yield names[weight], in_weight(model[names[weight]].bool(), kept["forward"])


def _open_file(path: Path) -> SavedModel:
    try:
        if not _is_safetensors(path):
            return SavedModel(path, load_foreign(path))
        if is_csr(path):
            return SavedModel(path, load_csr(path, masks=True), storage="csr")
        return SavedModel(path, read_tensors(path))
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        problem = f"cannot be read: {' '.join(str(error).split())}"
        raise CheckpointError(path, problem, "check the permissions, or give another file") from error


def _is_safetensors(path: Path) -> bool:
    # By content: names of files promise nothing. A file of torch.save begins with PK or a pickle's 0x80.
    with path.open("rb") as file:
        return file.read(HEADER_LENGTH_BYTES + 1)[HEADER_LENGTH_BYTES:] == b"{"
