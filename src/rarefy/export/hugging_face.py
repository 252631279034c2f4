"""Models as folders that Hugging Face's `from_pretrained` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.architectures.architecture import Architecture
from rarefy.architectures.registry import nearest
from rarefy.architectures.translation import to_file
from rarefy.checkpoint.manifest import write_file
from rarefy.checkpoint.tensor_file import encode_tensors
from rarefy.errors import RarefyError
from rarefy.export.job import Fill, Job
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face import HuggingFaceCausalModel, HuggingFaceModel


def hugging_face(job: Job) -> Fill:
    """A folder for `from_pretrained`; the built-in decoder becomes the architecture that computes the same.

    Raises:
        RarefyError: the model is no Hugging Face model and has no counterpart there.
    """
    model = job.model()
    if isinstance(model, GPTModel):
        return _decoder_folder(model)
    theirs = _theirs(model)

    def save(path: Path) -> None:
        with _without_progress_bars():
            theirs.save_pretrained(path)

    return save


def _decoder_folder(model: GPTModel) -> Fill:
    """What `save_pretrained` would write; the files are written here, so that nothing of Transformers is needed."""
    architecture = architecture_of(model)
    tensors = to_file(architecture, model.config, model.model.state_dict())
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    options = {**architecture.as_options(model.config), "torch_dtype": dtype, "use_cache": True}
    text = json.dumps(options, indent=2, sort_keys=True) + "\n"

    def save(path: Path) -> None:
        path.mkdir()
        write_file(path / "config.json", [text.encode()])
        # Transformers refuses a file whose header does not name the framework.
        write_file(path / "model.safetensors", encode_tensors(tensors, {"format": "pt"}))

    return save


def architecture_of(model: GPTModel) -> Architecture:
    """The architecture that computes what a decoder does.

    Raises:
        RarefyError: there is none; with what the nearest one cannot do.
    """
    architecture, objections = nearest(model.config)
    if objections:
        kind = f"in the nearest architecture of Transformers, {architecture.model_class}"
        raise RarefyError(
            f"--to hf: {', '.join(objections)} is not allowed {kind}; give a model without it, or use --to safetensors"
        )
    return architecture


def _theirs(model: nn.Module) -> Any:
    inner: Any = model.model if isinstance(model, HuggingFaceCausalModel | HuggingFaceModel) else model
    if isinstance(model, HuggingFaceCausalModel):
        # Turned off for training, and wanted again where text is generated.
        inner.config.use_cache = True
    if hasattr(inner, "save_pretrained"):
        return inner
    kinds = "a model of Transformers, or one of the built-in decoders"
    raise RarefyError(
        f"--to hf: {type(model).__name__} is not allowed; give {kinds}, or use --to safetensors"
    )


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    from transformers.utils import logging  # pyright: ignore[reportMissingImports]

    was_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_shown:
            logging.enable_progress_bar()
