"""`rarefy prune`: a saved model is pruned, and written as a folder of the same kind."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rarefy.checkpoint.directory import CheckpointParts, save
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import write_file
from rarefy.checkpoint.mask_names import free_mask_name
from rarefy.checkpoint.saved_model import SavedModel, open_saved
from rarefy.checkpoint.tensor_file import encode_tensors, snapshot
from rarefy.checkpoint.writing.folders import DIRECTORY_NAME
from rarefy.errors import ConfigError, RarefyError
from rarefy.export import output
from rarefy.export.calibration_text import token_batches
from rarefy.export.job import Fill, Job
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face_folder import files_with, load_folder, model_block
from rarefy.models.registry import build_model
from rarefy.pruning.by_layer import Progress
from rarefy.pruning.one_shot import Pruned, prune
from rarefy.trainer.session_builder import resolve_device

_TOKENIZER = "tokenizer.json"
# Files of weights that stay behind: in OUT they would be of the model that was not pruned.
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx")
# What the papers of SparseGPT and Wanda measure with.
_USUAL_LENGTH = 2048
_WITHOUT_LOSS = "; take --method magnitude, or rarefy.prune in Python, which takes a loss"


@dataclass(frozen=True, kw_only=True)
class PruneJob:
    """What to prune, and on what to measure it.

    Args:
        source: a Hugging Face folder, a checkpoint, a `model_dir` (its newest checkpoint), or a file of a model.
        out: the folder to write.
        sparsity: fraction of inactive connections, in [0, 1).
        method: as of `rarefy.prune`.
        data: text to measure on; None takes the training data of the run.
        batches: how many batches to measure on.
        batch_size: sequences in a batch of text.
        sequence_length: tokens in a sequence of text; None takes what the model allows, at most 2048.
        options: more of `rarefy.prune`: pattern, param_filter, distribution, seed.
        params: the file of the run.
        allow_imports: whether import paths in the configuration may be followed.
        device: where to compute.
        force: whether a folder of the same kind at `out` is replaced.
    """

    source: Path
    out: Path
    sparsity: float
    method: str = "wanda"
    data: Path | None = None
    batches: int = 16
    batch_size: int = 8
    sequence_length: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Path | None = None
    allow_imports: bool = True
    device: str = "auto"
    force: bool = False


def prune_saved(job: PruneJob, progress: Progress | None = None) -> Pruned:
    """Prunes a saved model.

    A Hugging Face folder becomes one with the same files, in which pruned weights have exact zeros and all other
    tensors are the same, byte for byte. A run becomes a `model_dir` with one checkpoint of weights and masks.

    Args:
        job: what to do.
        progress: called with the stages that are done, and all.

    Returns:
        What was pruned.

    Raises:
        ConfigError: a value that is not allowed.
        RarefyError: a model that cannot be read, measured or written; `out` is then as it was.
    """
    _refuse_inside(job)
    is_folder = output.is_model_folder(job.source)
    output.check_free(
        job.out,
        is_folder=True,
        force=job.force,
        is_ours=output.is_model_folder if is_folder else _holds_checkpoints,
    )
    return _prune_folder(job, progress) if is_folder else _prune_run(job, progress)


def _refuse_inside(job: PruneJob) -> None:
    source = job.source.resolve()
    out = job.out.resolve()
    if source.is_dir() and (source in (out, *out.parents) or out in source.parents):
        raise RarefyError(f"{job.out}: is {job.source} itself, inside of it or around it; give another path")


def _holds_checkpoints(folder: Path) -> bool:
    return all(DIRECTORY_NAME.fullmatch(one.name) for one in folder.iterdir())


def _prune_folder(job: PruneJob, progress: Progress | None) -> Pruned:
    block = model_block(job.source)
    model = build_model(block, path=str(job.source))
    # Or `model_block` would have refused the folder: it knows the decoder's architectures alone.
    assert isinstance(model, GPTModel)
    load_folder(model, job.source)
    tokenizer = job.source / _TOKENIZER
    batches = _batches(job, model, tokenizer if tokenizer.is_file() else None, run=None)
    done = _pruned(job, model, batches, progress)
    output.write(job.out, _folder(job.source, model, list(done.masks)))
    return done


def _prune_run(job: PruneJob, progress: Progress | None) -> Pruned:
    saved = _run_at(job.source)
    run = Job(saved, job.params, job.allow_imports)
    model = run.model()
    done = _pruned(job, model, _batches(job, model, None, run), progress)
    output.write(job.out, _checkpoint(saved, model, done.masks))
    return done


def _run_at(source: Path) -> SavedModel:
    try:
        return open_saved(source)
    except CheckpointError as error:
        is_run = DIRECTORY_NAME.fullmatch(source.resolve().name) or any(source.glob("checkpoint_*"))
        if source.is_file() or is_run:
            raise
        # It may have been meant as the other kind of folder.
        remedy = f"{error.remedy}, or a Hugging Face folder, which has a {output.FOLDER_MARK}"
        raise CheckpointError(error.path, error.problem, remedy) from error


def _pruned(job: PruneJob, model: nn.Module, batches: Iterable[Any], progress: Progress | None) -> Pruned:
    model.eval().to(resolve_device(job.device))
    options = {**job.options, "method": job.method, "batches": list(batches), "progress": progress}
    try:
        done = prune(model, job.sparsity, **options)
    except ConfigError as error:
        # Options of Python are flags here, and so is the length of what is read from --data.
        is_length = error.path == "batch.input_ids" and job.data is not None
        flag = "sequence_length" if is_length else error.path
        raise ConfigError(f"--{flag}", error.given, error.allowed) from None
    except RarefyError as error:
        said, remedy, _ = str(error).partition("; give loss: ")
        raise RarefyError(said + (_WITHOUT_LOSS if remedy else "")) from error
    model.to("cpu")
    return done


def _batches(job: PruneJob, model: nn.Module, tokenizer: Path | None, run: Job | None) -> list[Any]:
    if job.data is not None:
        return _text(job, model, tokenizer)
    if run is not None and run.builder.config.fit is not None:
        return list(islice(run.training_data(), job.batches))
    if job.method in ("magnitude", "random"):
        return []
    kind = "a run without a fit block" if run is not None else "a Hugging Face folder"
    raise ConfigError(
        "--data", f"{job.method} for {kind} without it", "a text file or a folder", "--data text.txt"
    )


def _text(job: PruneJob, model: Any, tokenizer: Path | None) -> list[Any]:
    assert job.data is not None
    vocabulary = getattr(model, "vocab_size", None) or getattr(
        getattr(model, "config", None), "vocab_size", None
    )
    if not isinstance(vocabulary, int):
        given = f"text for {type(model).__name__}, which is no language model,"
        raise ConfigError("--data", given, "no --data, for the training data of the run")
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None) or _USUAL_LENGTH
    length = min(longest, _USUAL_LENGTH) if job.sequence_length is None else job.sequence_length
    return token_batches(
        job.data,
        tokenizer=tokenizer,
        vocab_size=vocabulary,
        length=length,
        batch_size=job.batch_size,
        count=job.batches,
    )


def _folder(source: Path, model: GPTModel, names: Sequence[str]) -> Fill:
    own = [name.removeprefix("model.") for name in names]

    def save_files(path: Path) -> None:
        path.mkdir()
        for file in sorted(source.iterdir()):
            if file.is_file() and not file.name.endswith(_WEIGHTS):
                shutil.copyfile(file, path / file.name)
        for name, tensors in files_with(model, source, own):
            write_file(path / name, encode_tensors(snapshot(tensors), {"format": "pt"}))

    return save_files


def _checkpoint(saved: SavedModel, model: nn.Module, masks: Mapping[str, Tensor]) -> Callable[[Path], object]:
    state: dict[str, Tensor] = dict(model.state_dict())
    for name, mask in masks.items():
        state[free_mask_name(name, state.__contains__)] = mask.cpu()
    parts = CheckpointParts(state, params=saved.params)
    step = saved.step or 0

    def save_checkpoint(path: Path) -> None:
        save(path, step, parts)

    return save_checkpoint
