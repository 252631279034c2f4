"""Decoders that start from a Hugging Face folder: how they are built, and the weights in its safetensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from rarefy.architectures.architecture import Architecture
from rarefy.architectures.registry import ARCHITECTURES
from rarefy.architectures.translation import from_file, to_file
from rarefy.checkpoint.tensor_file import read_tensors
from rarefy.errors import RarefyError, did_you_mean
from rarefy.models.gpt import GPTModel

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What a decoder makes itself, and files do not hold.
_OWN = ("position_embed_helper.slopes",)


def model_block(folder: Path) -> dict[str, Any]:
    """The `model` block, with its name, that builds what a folder holds.

    Args:
        folder: with a `config.json`.

    Raises:
        RarefyError: there is none, or it is of a model that the decoders here cannot compute.
    """
    options = _options(folder)
    try:
        return _architecture(options).as_keys(options)
    except KeyError as error:
        raise RarefyError(f"{folder / 'config.json'}: has no {error}; give a complete one") from error
    except RarefyError as error:
        raise RarefyError(f"{folder}: {error}") from error


def load_folder(model: GPTModel, folder: Path) -> None:
    """Takes the weights of a folder over; of a model on the meta device, checks that they would fit.

    Args:
        model: built from `model_block(folder)`, or with other rates and ranges.
        folder: with one safetensors file, or several and their index.

    Raises:
        RarefyError: weights that are missing, of another model, or not readable.
    """
    architecture = _architecture(_options(folder))
    named = _tensors(folder)
    try:
        state = from_file(architecture, model.config, named)
    except RarefyError as error:
        raise RarefyError(f"{folder}: {error}") from error
    own = model.model.state_dict()
    for name, tensor in state.items():
        if own[name].shape != tensor.shape:
            sizes = f"{list(tensor.shape)} there and {list(own[name].shape)} by the model's keys"
            raise RarefyError(f"{folder}: {name} is {sizes}; leave out what the folder's config.json says")
    if not any(tensor.is_meta for tensor in own.values()):
        # Files that lack a weight were refused above, so only what is made here can be missing.
        missing = model.model.load_state_dict(state, strict=False).missing_keys
        assert all(name.endswith(_OWN) for name in missing)


def files_with(
    model: GPTModel, folder: Path, names: Collection[str]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """The files of a folder with some weights of a model in place of their own; all others as they are.

    Args:
        model: built from the folder, in CPU memory.
        folder: with one safetensors file, or several.
        names: of the weights, in `model.model`.

    Returns:
        Name and tensors of one file after the other, in their own number formats.
    """
    architecture = _architecture(_options(folder))
    rows = [row for row in architecture.rows(model.config) if set(row.here) & set(names)]
    changed = {name for row in rows for name in row.there}
    new = {
        name: one
        for name, one in to_file(architecture, model.config, model.model.state_dict()).items()
        if name in changed
    }
    # Files of a model without its output layer lack the prefix.
    prefix = architecture.layers.split(".")[0] + "."
    for path in _files(folder):
        tensors = read_tensors(path)
        for name, tensor in tensors.items():
            found = new.get(name, new.get(prefix + name))
            tensors[name] = tensor if found is None else found.to(tensor.dtype)
        yield path.name, tensors


def _options(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    try:
        options = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RarefyError(f"{path}: cannot be read ({reason}); give a folder of `save_pretrained`") from error
    if not isinstance(options, dict):
        raise RarefyError(f"{path}: is no map; give a folder of `save_pretrained`")
    return options


def _architecture(options: Mapping[str, Any]) -> Architecture:
    known = {architecture.model_type: architecture for architecture in ARCHITECTURES}
    given = str(options.get("model_type"))
    if given not in known:
        raise RarefyError(
            f"config.json: model_type {given!r} is not allowed; give {did_you_mean(given, known)}"
        )
    return known[given]


def _tensors(folder: Path) -> dict[str, Tensor]:
    try:
        named: dict[str, Tensor] = {}
        for path in _files(folder):
            named |= read_tensors(path)
        return named
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RarefyError(f"{folder}: its weights cannot be read ({reason})") from error


def _files(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if index.is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    if not (folder / _ONE_FILE).is_file():
        remedy = "save the model with Transformers' save_pretrained, which writes it"
        raise RarefyError(f"{folder}: has no {_ONE_FILE}; {remedy}")
    return [folder / _ONE_FILE]
