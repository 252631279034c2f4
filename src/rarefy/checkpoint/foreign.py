"""Checkpoints that other programs wrote with `torch.save`; nothing in them is ever executed."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.checkpoint.error import CheckpointError
from rarefy.torch_private import COMPILED_PREFIX

CONTAINERS = ("model", "state_dict", "model_state_dict")
WRAPPERS = ("module.", COMPILED_PREFIX)
_CONVERSION = (
    "where cerebras.pytorch is installed, convert it with: python -c 'import torch, cerebras.pytorch as c; "
    'torch.save({{"model": c.load("{path}")["model"]}}, "model.pt")\''
)
SECOND_NAME = ("transformer_decoder.norm.", "ln_f.")
HDF5_MAGIC = b"\x89HDF"


def load_foreign(path: Path, known: Collection[str] = ()) -> dict[str, Tensor]:
    """The model's state dict in a `.pt` or `.mdl` file, masks included.

    Args:
        path: a file that `torch.save` wrote: a state dict, or a dict with one under `model`, `state_dict` or
            `model_state_dict`.
        known: names that the model has; these are never unwrapped.

    Returns:
        Tensors in CPU memory. The wrappers `module.` and `_orig_mod.` are cut off the names, so that
        `module._orig_mod.fc.weight_mask` becomes `fc.weight_mask`.

    Raises:
        CheckpointError: when the file holds anything but tensors and plain values, or no state dict.
    """
    path = Path(path)
    return without_aliases(unwrap_names(path, _state_dict(path, _read(path)), known), known)


def without_aliases(state: Mapping[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """A state dict without second names of parameters that it has under a name that the model knows.

    The Model Zoo's decoders save `ln_f` once more as `transformer_decoder.norm`.

    Args:
        state: tensors by name.
        known: names that the model has; nothing is left out where there are none.

    Example:
        >>> one = torch.ones(2)
        >>> list(without_aliases({"ln_f.weight": one, "transformer_decoder.norm.weight": one}, ["ln_f.weight"]))
        ['ln_f.weight']
    """
    kept = {}
    for name, tensor in state.items():
        first = name.replace(*SECOND_NAME)
        # Equal content is asked for as well: under the second name there could be a norm of another model.
        is_second = bool(known) and name not in known and first != name and first in known and first in state
        if not (is_second and torch.equal(state[first], tensor)):
            kept[name] = tensor
    return kept


def unwrap_names(path: Path, state: Mapping[str, Tensor], known: Collection[str] = ()) -> dict[str, Tensor]:
    """A state dict without wrapper prefixes.

    Args:
        path: for the message.
        state: tensors by name.
        known: names that stay as they are.

    Raises:
        CheckpointError: when two entries end up with the same name.

    Example:
        >>> list(unwrap_names(Path("a.pt"), {"module.layers.0._orig_mod.weight": torch.ones(1)}))
        ['layers.0.weight']
    """
    unwrapped: dict[str, Tensor] = {}
    for name, tensor in state.items():
        short = name if name in known else _unwrap(name)
        if short in unwrapped:
            raise CheckpointError(path, f"has {short} twice, under different wrappers", "keep one of the two")
        unwrapped[short] = tensor
    return unwrapped


def _read(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_hdf5 = file.read(len(HDF5_MAGIC)) == HDF5_MAGIC
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise CheckpointError(path, problem, "check the path and the permissions") from error
    if is_hdf5:
        raise CheckpointError(path, "is an HDF5 file of the Model Zoo", _CONVERSION.format(path=path))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises whatever the unpickler, the archive or the storage stumbled over; there is no common base.
    except Exception as error:
        problem = "is damaged, or holds more than tensors and plain values (loading that could run code)"
        raise CheckpointError(path, problem, "give a file that holds a state dict") from error


def _state_dict(path: Path, content: Any) -> dict[str, Tensor]:
    # One in the other too: `model` may hold a `state_dict` beside other things.
    for key in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not content:
        raise CheckpointError(path, "holds no state dict", f"put one there, or one under {CONTAINERS[0]}")
    for name, value in content.items():
        if not isinstance(value, Tensor):
            problem = f"is no state dict: {name} is a {type(value).__name__}, not a tensor"
            raise CheckpointError(path, problem, f"put the state dict under {CONTAINERS[0]}")
    return content


def _unwrap(name: str) -> str:
    # Layers may be compiled one by one; `module.` further inside may be the model's own name.
    name = name.replace(f".{WRAPPERS[1]}", ".")
    # Wrapped in either order, or twice.
    while name.startswith(WRAPPERS):
        name = name[name.index(".") + 1 :]
    return name
