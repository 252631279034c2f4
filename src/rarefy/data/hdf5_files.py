"""Rows of the dataset `data` across several HDF5 files."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rarefy.errors import ConfigError, RarefyError
from rarefy.imports import require

# Far below the usual limit of open files of a process.
_OPEN_FILES = 64
_SCANNED = 1 << 26  # numbers that are read to check token ids before training, about a second's work


class ReadError(RarefyError):
    """A file that cannot be read any more; one line even when a data loader's worker passes it on."""

    def __init__(self, message: str) -> None:
        # torch makes the exception of a worker anew, from its class and the text of the whole traceback.
        last_line = message.strip().splitlines()[-1]
        super().__init__(last_line.removeprefix(f"{__name__}.ReadError: "))


def find_files(folders: Sequence[str]) -> list[Path]:
    """All `*.h5` directly in the folders, sorted.

    Raises:
        ConfigError: a folder does not exist, or there is no such file.
    """
    for folder in folders:
        if not Path(folder).is_dir():
            raise ConfigError("data_dir", f"{folder!r} (no such directory)", "directories with *.h5 files")
    files = sorted(file for folder in folders for file in Path(folder).glob("*.h5"))
    if not files:
        given = f"{', '.join(folders)} (no *.h5 files in it)"
        raise ConfigError("data_dir", given, "directories with *.h5 files")
    return files


class HDF5Rows:
    """The rows of `data` in all files, joined along the first axis and read as int64.

    Only the shapes are read at first. Each process opens the files for itself when it needs them, and keeps a
    bounded number of them open.

    Args:
        files: HDF5 files with an integer dataset `data`.

    Raises:
        ConfigError: a file cannot be read, has no such dataset, or its rows have another shape than those of
            the first file.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        shapes = [_inspect(file) for file in self.files]
        self.row_shape = shapes[0][1:]
        for file, shape in zip(self.files, shapes, strict=True):
            if shape[1:] != self.row_shape:
                given = f"{file} with data of shape {list(shape)}"
                allowed = f"rows of the shape {list(self.row_shape)}, as in {self.files[0].name}"
                raise ConfigError("data_dir", given, allowed)
        self.starts = [0, *accumulate(shape[0] for shape in shapes)]
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return self.starts[-1]

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        """Rows from `start` to `stop`, which may lie in several files.

        Raises:
            ReadError: a file cannot be read any more.
        """
        # To the right of equals: an empty file begins where the next one does, and has no row.
        first = int(np.searchsorted(self.starts, start, side="right")) - 1
        parts = []
        for number in range(first, len(self.files)):
            begin = self.starts[number]
            end = self.starts[number + 1]
            if begin >= stop:
                break
            parts.append(self._read_file(number, max(start, begin) - begin, min(stop, end) - begin))
        return np.concatenate(parts)

    def largest(self, chosen: Callable[[NDArray[np.int64]], NDArray[np.int64]]) -> int | None:
        """The largest of the `chosen` numbers of all rows; None for more than `_SCANNED` numbers.

        Args:
            chosen: picks from rows of one read.
        """
        size = int(np.prod(self.row_shape))
        if len(self) * size > _SCANNED:
            return None
        # About 8 MB at a time, however long a row is.
        step = max(_SCANNED // 64 // max(size, 1), 1)
        reads = (self.read(start, min(start + step, len(self))) for start in range(0, len(self), step))
        return max((int(chosen(rows).max()) for rows in reads), default=0)

    def _read_file(self, number: int, start: int, stop: int) -> NDArray[np.int64]:
        try:
            # The files hold int32; torch's losses take int64 labels only.
            return self._file(number)["data"][start:stop].astype(np.int64)
        # To h5py a dataset that is not there any more is a KeyError.
        except (OSError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise ReadError(
                f"{self.files[number]}: rows {start} to {stop} cannot be read ({reason}); put the file back as it was"
            ) from None

    def _file(self, number: int) -> Any:
        # HDF5's handles must not be used after a fork: a worker opens its own, and leaves the parent's alone.
        if self._process != os.getpid():
            self._open = OrderedDict()
            self._process = os.getpid()
        if number not in self._open:
            h5py = require("hdf5", "h5py")

            self._open[number] = h5py.File(self.files[number], "r")
            if len(self._open) > _OPEN_FILES:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be pickled, as for spawned workers.
        return {**self.__dict__, "_open": OrderedDict()}


def _inspect(file: Path) -> tuple[int, ...]:
    h5py = require("hdf5", "h5py")

    try:
        with h5py.File(file, "r") as opened:
            data = opened.get("data")
            if not isinstance(data, h5py.Dataset):
                raise ConfigError(
                    "data_dir", f"{file} (it has no dataset `data`)", "files with a dataset `data`"
                )
            if data.dtype.kind not in "iu" or data.ndim == 0:
                given = f"{file} with data of type {data.dtype} and shape {list(data.shape)}"
                raise ConfigError("data_dir", given, "integers of shape [tokens] or [samples, 3, length]")
            return data.shape
    except OSError as error:
        reason = " ".join(str(error).split())
        raise ConfigError("data_dir", f"{file} ({reason})", "readable HDF5 files") from error
