"""Checkpoints that survive a kill at any moment; pure storage that knows no trainer.

A checkpoint is a directory `checkpoint_{step}`:

    model.safetensors  optimizer.safetensors  state.safetensors  rng.safetensors    the tensors of each part, packed
    state.json                                format version, step, and what of the parts is no tensor
    params.yaml                               the configuration of the run
    MANIFEST.json                             sizes and SHA-256 of all of these, written last

Everything is written to `.tmp-checkpoint_{step}`, flushed to the disk and renamed, so a directory with the
final name is always complete. Where that name is taken, the old directory first becomes
`checkpoint_{step}.replaced`, which counts as a checkpoint too, and goes only after the rename: there is
always one. The next save clears what a kill left behind. A lock makes writers to one directory take turns.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor

from rarefy.checkpoint.error import CheckpointError, NewerFormatError
from rarefy.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    USE_ANOTHER,
    Manifest,
    check_version,
    read_json,
    verify,
    write_file,
    write_manifest,
)
from rarefy.checkpoint.nested import Json, join, split
from rarefy.checkpoint.packed import pack
from rarefy.checkpoint.tensor_file import encode_tensors, read_tensors, snapshot
from rarefy.disk import flush
from rarefy.validation import StepCount

PART_NAMES = ("model", "optimizer", "state", "rng")
STATE_NAME = "state.json"
PARAMS_NAME = "params.yaml"
FILE_NAMES = (*(f"{part}.safetensors" for part in PART_NAMES), STATE_NAME, PARAMS_NAME)
DIRECTORY_NAME = re.compile(r"checkpoint_(\d+)(\.replaced)?")
Flag = Annotated[bool, Field(strict=True, description="true or false", examples=["true"])]
Folder = Annotated[Path | None, Field(description="a directory", examples=["./checkpoints"])]
TEMPORARY_PREFIX = ".tmp-"
REPLACED_SUFFIX = ".replaced"


class CheckpointConfig(BaseModel):
    """The `checkpoint:` block.

    Args:
        steps: save every so many optimizer steps, ≥ 1; None saves at the end only.
        autoload_last_checkpoint: continue from the newest valid checkpoint of the model directory.
        disable_strict_checkpoint_loading: load a dense checkpoint into a sparse run and the other way round.
        save_initial_checkpoint: save before the first step as well.
        checkpoint_root: where checkpoints go; None is the model directory.
        keep_last: keep the newest so many, ≥ 1; None keeps all.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    steps: StepCount | None = None
    autoload_last_checkpoint: Flag = True
    disable_strict_checkpoint_loading: Flag = False
    save_initial_checkpoint: Flag = False
    checkpoint_root: Folder = None
    keep_last: Annotated[
        int | None, Field(strict=True, ge=1, description="a whole number of checkpoints ≥ 1", examples=[3])
    ] = None


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


def save(root: Path, step: int, parts: CheckpointParts, *, keep_last: int | None = None) -> Path:
    """Writes `root/checkpoint_{step}` and returns its path once it is safe on the disk.

    Args:
        root: made when missing.
        step: global step, ≥ 0. A checkpoint of the same step is replaced.
        parts: what to store.
        keep_last: afterwards delete all checkpoints but the newest so many, ≥ 1; the new one always stays.

    Raises:
        CheckpointError: when a value cannot be stored or the file system refuses; earlier checkpoints
            stay intact.

    Example:
        >>> import tempfile, torch
        >>> path = save(Path(tempfile.mkdtemp()), 3, CheckpointParts(model={"w": torch.ones(2)}))
        >>> path.name, load(path).model["w"].tolist()
        ('checkpoint_3', [1.0, 1.0])
    """
    return _write(root, _Frozen.of(root, step, parts), keep_last)


def load(path: Path, only: Iterable[str] = PART_NAMES) -> CheckpointParts:
    """What `save` stored, exactly, after checking sizes and SHA-256 of every file.

    Args:
        path: a `checkpoint_{step}` directory.
        only: the parts to read, `model` among them.

    Returns:
        The parts, tensors in CPU memory; those that were not asked for are empty.

    Raises:
        CheckpointError: one line with the path, what is wrong and what to do.
    """
    path = Path(path)
    try:
        verify(path, FILE_NAMES)
        skeletons = _read_skeletons(path / STATE_NAME)
        loaded = {part: _read_part(path, part, skeletons) for part in only}
        params = _read_params(path / PARAMS_NAME)
    except OSError as error:
        raise _unreadable(path, error) from error
    return CheckpointParts(**loaded, params=params)


def load_params(path: Path) -> dict[str, Any]:
    """The configuration in a checkpoint, without reading its tensors.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        return _read_params(path / PARAMS_NAME) or {}
    except OSError as error:
        raise _unreadable(path, error) from error


def newest_valid(root: Path, warn: Callable[[str], None]) -> Path | None:
    """The checkpoint with the highest step that passes every check.

    Args:
        root: the directory that holds checkpoints; may be missing.
        warn: called with one line for each newer one that is skipped.

    Raises:
        NewerFormatError: a newer one was written by a newer rarefy; a run that passed over it would replace it.
    """
    for path in reversed(_candidates(Path(root))):
        try:
            verify(path, FILE_NAMES)
            return path
        # A subclass of the next one, and the only fault that must not be skipped.
        except NewerFormatError:
            raise
        except CheckpointError as error:
            warn(f"skipping {path.name}: {error}")
        except OSError as error:
            warn(f"skipping {path.name}: {_unreadable(path, error)}")
    return None


class CheckpointWriter:
    """Saves in the background: training waits only while its tensors are copied in memory.

    The copy needs as much memory as the checkpoint is large, until it is written. One is written at a time,
    and the interpreter does not exit before the last one is done.

    Args:
        root: where the checkpoints go.
        keep_last: as for `save`.

    Example:
        >>> import tempfile, torch
        >>> writer = CheckpointWriter(Path(tempfile.mkdtemp()))
        >>> path = writer.save_async(3, CheckpointParts(model={"w": torch.ones(2)}))
        >>> writer.wait(); path.is_dir()
        True
    """

    def __init__(self, root: Path, *, keep_last: int | None = None) -> None:
        self.root = Path(root)
        self.keep_last = keep_last
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def save_async(self, step: int, parts: CheckpointParts) -> Path:
        """Takes a copy of `parts` and returns the path that the checkpoint is going to have.

        Raises:
            CheckpointError: when a value cannot be stored, or when the previous checkpoint failed.
        """
        # First, so that there are never two copies of the training state in memory.
        self.wait()
        frozen = _Frozen.of(self.root, step, parts)
        # No daemon: the interpreter would end it half-way through the file.
        self._thread = threading.Thread(target=self._run, args=(frozen,), name=f"checkpoint_{step}")
        self._thread.start()
        return frozen.path

    def wait(self) -> None:
        """Returns when the last checkpoint is safe on the disk.

        Raises:
            CheckpointError: when it could not be written; reported once.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def _run(self, frozen: _Frozen) -> None:
        try:
            _write(self.root, frozen, self.keep_last)
        # Raised here it would be printed and lost with the thread; `wait` raises it where somebody can act.
        except Exception as error:
            self._error = error


@dataclass(frozen=True)
class _Frozen:
    """Everything that goes to the disk, cut off from the tensors that training goes on changing."""

    path: Path
    step: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    texts: Mapping[str, bytes]

    @classmethod
    def of(cls, root: Path, step: int, parts: CheckpointParts) -> _Frozen:
        path = Path(root) / f"checkpoint_{step}"
        skeletons = {}
        tensors = {}
        for part in PART_NAMES:
            try:
                skeletons[part], named = split(getattr(parts, part))
                tensors[part] = snapshot(named)
            except TypeError as error:
                remedy = "keep numbers, strings, None, lists, tuples, dicts and dense tensors there"
                raise CheckpointError(path, f"cannot be saved: in {part}, {error}", remedy) from error
        return cls(path, step, tensors, _texts(path, step, skeletons, parts.params))


def _texts(path: Path, step: int, skeletons: Json, params: dict[str, Any]) -> dict[str, bytes]:
    state = {"format_version": FORMAT_VERSION, "step": step, **skeletons}
    try:
        yaml_text = yaml.safe_dump(params, sort_keys=False, allow_unicode=True)
    except yaml.YAMLError as error:
        problem = f"cannot be saved: params hold what YAML cannot ({str(error).splitlines()[0]})"
        raise CheckpointError(path, problem, "keep plain values there") from error
    # `split` has tagged infinities and NaN; a bare one would be no JSON to any other reader.
    state_text = json.dumps(state, indent=1, allow_nan=False)
    return {STATE_NAME: state_text.encode(), PARAMS_NAME: yaml_text.encode()}


def _write(root: Path, frozen: _Frozen, keep_last: int | None) -> Path:
    temporary = frozen.path.with_name(f"{TEMPORARY_PREFIX}{frozen.path.name}")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _only_writer(root):
            _clear_leftovers(root)
            try:
                _fill(temporary, frozen)
                _publish(temporary, frozen.path)
            finally:
                # After a failure only; what was published no longer has this name. A full disk gets its space back.
                shutil.rmtree(temporary, ignore_errors=True)
            _delete_old(root, frozen.path, keep_last)
    except OSError as error:
        reason = error.strerror or str(error)
        remedy = "free space or fix the permissions; the checkpoints before it are intact"
        raise CheckpointError(frozen.path, f"cannot be written: {reason}", remedy) from error
    return frozen.path


@contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    """Holds a lock that a kill releases too; goes without one where the file system has none."""
    descriptor = os.open(root, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        # Closing alone would not do while a data worker, forked meanwhile, holds a copy of the descriptor.
        with suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_UN)
        os.close(descriptor)


def _fill(temporary: Path, frozen: _Frozen) -> None:
    temporary.mkdir()
    chunks: dict[str, Iterable[bytes | memoryview]] = {name: [text] for name, text in frozen.texts.items()}
    chunks |= {f"{part}.safetensors": encode_tensors(*pack(named)) for part, named in frozen.tensors.items()}
    files = {name: write_file(temporary / name, chunks[name]) for name in FILE_NAMES}
    write_manifest(temporary, Manifest(format_version=FORMAT_VERSION, step=frozen.step, files=files))
    flush(temporary)


def _publish(temporary: Path, final: Path) -> None:
    replaced = final.with_name(final.name + REPLACED_SUFFIX)
    # No rename replaces a directory that holds something.
    if final.exists():
        final.rename(replaced)
    temporary.rename(final)
    # The new name has to be on the disk before the old checkpoint goes.
    flush(final.parent)
    if replaced.exists():
        _delete(replaced)


def _clear_leftovers(root: Path) -> None:
    for path in root.glob(f"{TEMPORARY_PREFIX}checkpoint_*"):
        shutil.rmtree(path)
    for path in root.glob(f"checkpoint_*{REPLACED_SUFFIX}"):
        final = path.with_name(path.name.removesuffix(REPLACED_SUFFIX))
        if final.exists():
            _delete(path)
        else:
            # Killed between the two renames of `_publish`: this is the only checkpoint of its step.
            path.rename(final)


def _delete_old(root: Path, newest: Path, keep_last: int | None) -> None:
    if keep_last is None:
        return
    # A directory that is no checkpoint must not take the place of one that is kept.
    complete = [path for path in _candidates(root) if path != newest and (path / MANIFEST_NAME).exists()]
    for path in complete[: max(0, len(complete) - keep_last + 1)]:
        _delete(path)


def _delete(path: Path) -> None:
    """Renames first, so that a kill half-way leaves no damaged checkpoint behind."""
    condemned = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
    path.rename(condemned)
    shutil.rmtree(condemned)


def _candidates(root: Path) -> list[Path]:
    """Directories named like a checkpoint, the best last."""
    if not root.is_dir():
        return []
    named = [(DIRECTORY_NAME.fullmatch(path.name), path) for path in root.iterdir()]
    # Of one step the set-aside checkpoint is the older.
    ranked = [(int(match[1]), match[2] is None, path) for match, path in named if match and path.is_dir()]
    return [path for _, _, path in sorted(ranked)]


def _read_skeletons(path: Path) -> dict[str, Json]:
    content = read_json(path)
    check_version(path, content)
    return content


def _read_part(path: Path, part: str, skeletons: dict[str, Json]) -> Any:
    file = path / f"{part}.safetensors"
    try:
        return join(skeletons[part], read_tensors(file))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(file, f"does not fit {STATE_NAME} ({error})", USE_ANOTHER) from error


def _read_params(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise CheckpointError(path, "is not valid YAML", USE_ANOTHER) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(path, f"cannot be read: {error.strerror or error}", "fix the permissions")
