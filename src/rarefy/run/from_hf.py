"""`model: {from_hf: FOLDER}`: what the folder says, filled in under what the file says."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.errors import ConfigError, RarefyError, join_path
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face_folder import load_folder, model_block
from rarefy.validation import shorten

log = logging.getLogger("rarefy")


def with_folder(init: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """`trainer.init` with a whole `model` block, where that names a Hugging Face folder.

    Args:
        init: whose `model` has the key `from_hf`; as the user gave it, or as a checkpoint keeps it: then the block is
            whole already, and the folder may be gone.
        path: where it stands.

    Raises:
        ConfigError: a folder that cannot be used, or a model of another kind beside it.
    """
    model = init["model"]
    where = join_path(path, "model.from_hf")
    folder = model["from_hf"]
    if not isinstance(folder, str) or not folder:
        raise ConfigError(where, shorten(folder), "the path of a Hugging Face folder", "./llama")
    if "name" in model and not Path(folder).exists():
        return init
    try:
        found = model_block(Path(folder))
    except RarefyError as error:
        raise ConfigError(where, f"{folder} ({error})", "a folder of one of these models") from error
    if str(model.get("name", found["name"])).lower() != found["name"]:
        allowed = f"{found['name']}, which is what the folder holds, or leave the name out"
        raise ConfigError(join_path(path, "model.name"), shorten(model["name"]), allowed)
    # A whole block without this key is of a checkpoint from before there was one.
    older = {"rotary_pairs": "adjacent"} if "rotary_dim" in model else {}
    return {**init, "model": {**found, **older, **model}}


def take_over(model: nn.Module, folder: str, path: str) -> None:
    """Gives a model the weights of a Hugging Face folder.

    Raises:
        ConfigError: the model is none of the decoders, or the weights are not its own.
    """
    if not isinstance(model, GPTModel):
        raise ConfigError(path, f"{folder} beside {type(model).__name__}", "it for the built-in decoders")
    try:
        load_folder(model, Path(folder))
    except RarefyError as error:
        raise ConfigError(path, f"{folder} ({error})", "a folder with all weights of this model") from error
    log.info("the model starts from %s", folder)
