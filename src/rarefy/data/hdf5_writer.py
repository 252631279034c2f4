"""From text files to the HDF5 files that `GptHDF5MapDataProcessor` reads."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from rarefy.disk import flush
from rarefy.errors import ConfigError, RarefyError
from rarefy.imports import require

Tokens = NDArray[Any]
Progress = Callable[[int, int], None]

_BLOCK_BYTES = 1 << 22


def write_hdf5(
    files: Sequence[Path],
    out_dir: Path,
    *,
    max_sequence_length: int,
    tokenizer: Path | None = None,
    format: Literal["samples", "corpus"] = "samples",
    samples_per_file: int = 10_000,
    progress: Progress | None = None,
) -> list[Path]:
    """Writes the tokens of text files, joined in the given order, to `out_dir/data-00000.h5` and so on.

    The directory appears whole or not at all: it is written under another name, flushed and renamed.

    Args:
        files: text files.
        out_dir: a directory that does not exist or is empty.
        max_sequence_length: tokens in a sample, ≥ 1.
        tokenizer: a `tokenizer.json` of Hugging Face; None makes one token of each byte.
        format: `samples` is int32 [samples, 3, length] with the last sample padded under a loss mask of 0;
            `corpus` is int32 [tokens].
        samples_per_file: samples in a file, or for a corpus this many times max_sequence_length tokens, ≥ 1.
        progress: called with the bytes read so far and the bytes in all.

    Returns:
        The files written.

    Raises:
        ConfigError: an argument out of range, or a directory that is not empty.
        RarefyError: a file cannot be read or written, there are fewer than two tokens, or
            `tokenizers` is not installed.
    """
    _check(files, out_dir, max_sequence_length, samples_per_file, format)
    pieces = _byte_pieces(files) if tokenizer is None else _token_pieces(files, load_tokenizer(tokenizer))
    if progress is not None:
        pieces = _report(pieces, progress, sum(_size(file) for file in files))
    tokens = (piece for piece, _ in pieces)
    # Files of samples share a token: the last label of one is the first input of the next. A corpus is read as one.
    chunks = _chunks(tokens, samples_per_file * max_sequence_length, overlap=int(format == "samples"))
    with _appearing(out_dir) as folder:
        names = []
        for number, chunk in enumerate(chunks):
            data = to_samples(chunk, max_sequence_length) if format == "samples" else chunk
            names.append(_write(folder / f"data-{number:05}.h5", data))
        if not names:
            raise RarefyError(f"{files[0]} and what follows it: fewer than two tokens; give files with text")
    return [out_dir / name for name in names]


def to_samples(tokens: Tokens, length: int) -> NDArray[np.int32]:
    """Windows of tokens [tokens] as input ids, loss mask and labels [samples, 3, length].

    The last one is padded with zeros under a loss mask of 0.

    Example:
        >>> to_samples(np.array([5, 6, 7, 8]), length=2).tolist()
        [[[5, 6], [1, 1], [6, 7]], [[7, 8], [1, 0], [8, 0]]]
    """
    # The first token is no label, the last one no input.
    labels = len(tokens) - 1
    count = -(-labels // length)
    padded = np.zeros(count * length + 1, dtype=np.int32)
    padded[: len(tokens)] = tokens
    mask = np.arange(count * length) < labels
    fields = (padded[:-1], mask.astype(np.int32), padded[1:])
    return np.stack([field.reshape(count, length) for field in fields], axis=1)


def _check(files: Sequence[Path], out_dir: Path, length: int, samples_per_file: int, format: str) -> None:
    if not files:
        raise ConfigError("files", "an empty list", "one or more text files")
    for name, number in (("max_sequence_length", length), ("samples_per_file", samples_per_file)):
        if number < 1:
            raise ConfigError(name, number, "a whole number ≥ 1")
    if format not in ("samples", "corpus"):
        raise ConfigError("format", repr(format), "samples or corpus")
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise ConfigError("out_dir", f"{out_dir}, which is not an empty directory,", "a new directory")


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: OSError) -> RarefyError:
    return RarefyError(f"{file}: cannot be read ({error.strerror}); fix the permissions or give another file")


def _byte_pieces(files: Sequence[Path]) -> Iterator[tuple[Tokens, int]]:
    for file in files:
        try:
            with file.open("rb") as opened:
                while block := opened.read(_BLOCK_BYTES):
                    yield np.frombuffer(block, dtype=np.uint8), len(block)
        except OSError as error:
            raise _unreadable(file, error) from error


def _token_pieces(files: Sequence[Path], tokenizer: Any) -> Iterator[tuple[Tokens, int]]:
    for file in files:
        try:
            # Whole, since a tokenizer cannot be given a text cut anywhere.
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise _unreadable(file, error) from error
        except UnicodeDecodeError as error:
            raise RarefyError(f"{file}: is not UTF-8 text; convert it or use byte tokens") from error
        yield np.array(tokenizer.encode(text).ids, dtype=np.int32), _size(file)


def load_tokenizer(file: Path) -> Any:
    """The tokenizer of a `tokenizer.json`.

    Raises:
        RarefyError: the file is none, or `tokenizers` is not installed.
    """
    try:
        from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise RarefyError(
            "a tokenizer file needs the package tokenizers: pip install 'rarefy[transformers]'"
        ) from error
    try:
        return Tokenizer.from_file(str(file))
    # The package raises plain Exception.
    except Exception as error:
        reason = " ".join(str(error).split())
        raise RarefyError(f"{file}: is not a tokenizer file ({reason}); give a tokenizer.json") from error


def _report(
    pieces: Iterator[tuple[Tokens, int]], progress: Progress, total: int
) -> Iterator[tuple[Tokens, int]]:
    done = 0
    for piece, size in pieces:
        # First on, then counted: once this goes on, the piece has been dealt with.
        yield piece, size
        done += size
        progress(done, total)


def _chunks(pieces: Iterator[Tokens], length: int, *, overlap: int) -> Iterator[Tokens]:
    held: list[Tokens] = []
    count = 0
    for piece in pieces:
        held.append(piece)
        count += len(piece)
        # Joined only once there is enough, or every small piece would copy all that is held.
        if count >= length + overlap:
            joined = np.concatenate(held)
            while len(joined) >= length + overlap:
                yield joined[: length + overlap]
                joined = joined[length:]
            held = [joined]
            count = len(joined)
    # A single token is a label only, and a sample needs one before it.
    if count > overlap:
        yield np.concatenate(held)


@contextlib.contextmanager
def _appearing(out_dir: Path) -> Iterator[Path]:
    out_dir = out_dir.absolute()
    folder: Path | None = None
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        # Beside the target, because a rename does not cross file systems.
        folder = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
        yield folder
        # mkdtemp's directories are for their owner alone.
        folder.chmod(0o755)
        flush(folder)
        folder.rename(out_dir)
        flush(out_dir.parent)
    except OSError as error:
        reason = " ".join(str(error).split())
        remedy = "free space, fix the permissions or give another directory"
        raise RarefyError(f"{out_dir}: cannot be written ({reason}); {remedy}") from error
    finally:
        if folder is not None and folder.exists():
            shutil.rmtree(folder, ignore_errors=True)


def _write(file: Path, data: Tokens) -> str:
    h5py = require("hdf5", "h5py")

    with h5py.File(file, "w") as opened:
        opened.create_dataset("data", data=data.astype(np.int32))
    flush(file)
    return file.name
