"""Checkpoints that survive a kill at any moment; pure storage that knows no trainer.

A checkpoint is a directory `checkpoint_{step}`:

    model.safetensors  optimizer.safetensors  state.safetensors  rng.safetensors    the tensors of each part, packed
    state.json                                format version, step, and what of the parts is no tensor
    params.yaml                               the configuration of the run
    MANIFEST.json                             sizes and SHA-256 of all of these, written last

Of a model that `fully_shard` cut each further process writes its pieces to `model.00001.safetensors` and so on.

Everything is written to `.tmp-checkpoint_{step}`, flushed to the disk and renamed, so a directory with the
final name is always complete. Where that name is taken, the old directory first becomes
`checkpoint_{step}.replaced`, which counts as a checkpoint too, and goes only after the rename: there is
always one. The next save clears what a kill left behind. A lock makes writers to one directory take turns.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError

from rarefy.checkpoint.error import CheckpointError, NewerFormatError, unwritten
from rarefy.checkpoint.in_pieces import Wanted, read_cut
from rarefy.checkpoint.manifest import USE_ANOTHER, check_version, read_json, verify
from rarefy.checkpoint.nested import Json, join
from rarefy.checkpoint.writing.folders import (
    candidates,
    clear_leftovers,
    delete_old,
    only_writer,
    publish,
)
from rarefy.checkpoint.writing.frozen import (
    FILE_NAMES,
    PARAMS_NAME,
    PART_NAMES,
    STATE_NAME,
    CheckpointParts,
    Frozen,
    complete,
    read_pieces,
    temporary_of,
)
from rarefy.validation import StepCount

Flag = Annotated[bool, Field(strict=True, description="true or false", examples=["true"])]
Folder = Annotated[Path | None, Field(description="a directory", examples=["./checkpoints"])]


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

    # Built when first read: a plain loop imports this room too, and never has such a block.
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)
    steps: StepCount | None = None
    autoload_last_checkpoint: Flag = True
    disable_strict_checkpoint_loading: Flag = False
    save_initial_checkpoint: Flag = False
    checkpoint_root: Folder = None
    keep_last: Annotated[
        int | None, Field(strict=True, ge=1, description="a whole number of checkpoints ≥ 1", examples=[3])
    ] = None


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
    frozen = Frozen.of(root, step, parts)
    return _together(frozen, keep_last) if frozen.is_shared else _write(root, frozen, keep_last)


def load(
    path: Path, only: Iterable[str] = PART_NAMES, cut_as: Mapping[str, Wanted] | None = None
) -> CheckpointParts:
    """What `save` stored, exactly, after checking sizes and SHA-256 of every file.

    Args:
        path: a `checkpoint_{step}` directory.
        only: the parts to read.
        cut_as: by part, which tensors become DTensors, of which this process reads its piece alone.

    Returns:
        The parts, tensors in CPU memory, but for those that are cut; parts that were not asked for are empty.

    Raises:
        CheckpointError: one line with the path, what is wrong and what to do.
    """
    path = Path(path)
    try:
        verify(path, FILE_NAMES)
        skeletons = _read_skeletons(path / STATE_NAME)
        cuts = cut_as or {}
        loaded = {part: _read_part(path, part, skeletons, cuts.get(part)) for part in only}
        params = _read_params(path / PARAMS_NAME)
    except OSError as error:
        raise _unreadable(path, error) from error
    # Of the parts that may not be asked for, the model alone has no default.
    return CheckpointParts(**{"model": {}, **loaded}, params=params)


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
    for path in reversed(candidates(Path(root))):
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
        self._group: Any = None

    def save_async(self, step: int, parts: CheckpointParts) -> Path:
        """Takes a copy of `parts` and returns the path that the checkpoint is going to have.

        Raises:
            CheckpointError: when a value cannot be stored, or when the previous checkpoint failed.
        """
        # First, so that there are never two copies of the training state in memory.
        self.wait()
        frozen = Frozen.of(self.root, step, parts)
        write = partial(_write, self.root, frozen, self.keep_last)
        if frozen.is_shared:
            # In the other group training goes on meanwhile.
            self._group = self._group or dist.new_group(backend="gloo")
            write = partial(_together, frozen, self.keep_last, self._group)
        # No daemon: the interpreter would end it half-way through the file.
        self._thread = threading.Thread(target=self._run, args=(write,), name=f"checkpoint_{step}")
        self._thread.start()
        return frozen.path

    def wait(self) -> None:
        """Returns when the last checkpoint is safe on the disk.

        Raises:
            CheckpointError: when it could not be written; reported once.
        """
        self.settle()
        if self._error is not None:
            error = self._error
            self._error = None
            raise error

    def settle(self) -> None:
        """Returns when nothing is being written any longer; what went wrong is left for `wait` to raise."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, write: Callable[[], object]) -> None:
        try:
            write()
        # Raised here it would be printed and lost with the thread; `wait` raises it where somebody can act.
        except Exception as error:
            self._error = error


def _together(frozen: Frozen, keep_last: int | None, group: Any = None) -> Path:
    # Here, as importing torch's takes long, and only processes that hold pieces need it.
    from rarefy.checkpoint.writing.together import write_together

    write_together(frozen, keep_last, group)
    return frozen.path


def _write(root: Path, frozen: Frozen, keep_last: int | None) -> Path:
    temporary = temporary_of(frozen.path)
    try:
        root.mkdir(parents=True, exist_ok=True)
        with only_writer(root):
            clear_leftovers(root)
            try:
                _fill(temporary, frozen)
                publish(temporary, frozen.path)
            finally:
                # After a failure only; what was published no longer has this name. A full disk gets its space back.
                shutil.rmtree(temporary, ignore_errors=True)
            delete_old(root, frozen.path, keep_last)
    except OSError as error:
        raise unwritten(frozen.path, error) from error
    return frozen.path


def _fill(temporary: Path, frozen: Frozen) -> None:
    temporary.mkdir()
    complete(temporary, frozen.step, frozen.write(temporary))


def _read_skeletons(path: Path) -> dict[str, Json]:
    content = read_json(path)
    check_version(path, content)
    return content


def _read_part(path: Path, part: str, skeletons: dict[str, Json], wanted: Wanted | None) -> Any:
    file = path / f"{part}.safetensors"
    try:
        if wanted is not None:
            return join(skeletons[part], read_cut(path, part, wanted))
        return join(skeletons[part], read_pieces(path, part, skeletons))
    except (KeyError, TypeError, ValueError, SafetensorError) as error:
        raise CheckpointError(file, f"does not fit {STATE_NAME} ({error})", USE_ANOTHER) from error


def _read_params(path: Path) -> Any:
    # Here, as whoever trains without a file and without checkpoints never needs it.
    import yaml

    try:
        return yaml.safe_load(path.read_bytes())
    except yaml.YAMLError as error:
        raise CheckpointError(path, "is not valid YAML", USE_ANOTHER) from error


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(path, f"cannot be read: {error.strerror or error}", "fix the permissions")
