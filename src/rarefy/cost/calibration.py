"""The cost rule measured on this machine: a file of the user, which `rarefy bench --calibrate` writes.

The rule is a formula for each kernel; its coefficients are what is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import platform
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rarefy.errors import RarefyError
from rarefy.kernels import takes_blocks
from rarefy.kernels.instruction_sets import REFERENCE, instruction_set, matrix_unit

_PAIRS = 16  # sizes that the instructions for pairs of bfloat16 take are multiples of this
SCHEMA = 1  # one more whenever the format or the speed of the kernels changes
VARIABLE = "RAREFY_CACHE"


@dataclass(frozen=True)
class BreakEven:
    """A sparse layer's forward and backward pass, dense = 1, of one instruction set and dtype.

    (density / limit · (1 + tokens_offset / tokens) + overhead / (rows · columns · tokens))
    / (1 + dense_offset / tokens + dense_overhead / (rows · columns · tokens))

    Args:
        limit: density at which sparse and dense take equally long with many tokens.
        tokens_offset: tokens that a call costs on top of those it is given.
        overhead: fixed cost of a forward and backward call, in multiply-adds of one dense matrix product.
        dense_offset: the same as `tokens_offset` for the dense layer, which reads its weight and writes a gradient
            however few its tokens are. 0 where that was not measured, so that the rule is careful.
        dense_overhead: the same as `overhead` for the dense layer.

    Example:
        >>> round(BreakEven(0.5, 8, 4e6).relative_time(768, 768, 2048, 0.1), 3)
        0.204
    """

    limit: float
    tokens_offset: float
    overhead: float
    dense_offset: float = 0.0
    dense_overhead: float = 0.0

    def relative_time(self, rows: int, columns: int, tokens: int, density: float) -> float:
        """The expected time of a layer; see the class and `rarefy.cost.rule.relative_time`."""
        work = rows * columns * tokens
        sparse = density / self.limit * (1 + self.tokens_offset / tokens) + self.overhead / work
        return sparse / (1 + self.dense_offset / tokens + self.dense_overhead / work)

    def with_threads(self, threads: int) -> BreakEven:
        """The rule for several threads, whose products do more in the time that a call takes."""
        overheads = {"overhead": self.overhead * threads, "dense_overhead": self.dense_overhead * threads}
        return dataclasses.replace(self, **overheads)


@dataclass(frozen=True)
class Measurement:
    """What one layer took.

    Args:
        rows: output features.
        columns: input features.
        tokens: rows of the activations.
        density: share of active connections.
        dense: seconds of the dense layer's forward and backward pass.
        sparse: seconds of the sparse layer's.
        block: of its weight; None for single connections.

    Example:
        >>> Measurement(768, 768, 2048, density=0.1, dense=0.5, sparse=0.125).relative_time
        0.25
    """

    rows: int
    columns: int
    tokens: int
    density: float
    dense: float
    sparse: float
    block: tuple[int, int] | None = None

    @property
    def relative_time(self) -> float:
        """Time of the sparse layer, dense = 1."""
        return self.sparse / self.dense


def measured_block(block: tuple[int, int]) -> tuple[int, int]:
    """The blocks that stand for all of the same kernels in a measurement: the smallest, which gain least.

    Args:
        block: multiples of 8.

    Example:
        >>> measured_block((32, 64)), measured_block((32, 24))
        ((16, 16), (8, 8))
    """
    size = 8 if any(one % _PAIRS for one in block) else _PAIRS
    return size, size


def kernels_in_use(dtype: torch.dtype, block: tuple[int, int] | None = None) -> str:
    """The instruction set, and for layers of blocks what they are multiplied with.

    Args:
        dtype: of the activations.
        block: of the weight; None, and sizes that no block kernel takes, for single connections.

    Example:
        >>> kernels_in_use(torch.float32, (4, 4)) == kernels_in_use(torch.float32) == instruction_set()
        True
        >>> kernels_in_use(torch.float32, (32, 8)).removeprefix(instruction_set())
        ' blocks of 8'
    """
    name = instruction_set()
    if block is None or name == REFERENCE or not takes_blocks(block):
        return name
    size = measured_block(block)[0]
    unit = matrix_unit() if size == _PAIRS and dtype == torch.bfloat16 else ""
    return f"{unit or name} blocks of {size}"


@dataclass(frozen=True)
class Key:
    """What a measured rule holds for.

    Args:
        instruction_set: of the kernels, with the kind of blocks; see `kernels_in_use`.
        dtype: of the activations, without `torch.`.
        threads: of torch.
        processor: its model.
        torch: version of torch, whose dense products are the measure.
    """

    instruction_set: str
    dtype: str
    threads: int
    processor: str
    torch: str


def key_of(dtype: torch.dtype, block: tuple[int, int] | None = None) -> Key:
    """The key of this process as it is now.

    Args:
        dtype: of the activations.
        block: of the weight; None for single connections.

    Example:
        >>> key_of(torch.bfloat16).dtype
        'bfloat16'
    """
    name = str(dtype).removeprefix("torch.")
    return Key(
        kernels_in_use(dtype, block), name, torch.get_num_threads(), processor(), str(torch.__version__)
    )


@functools.cache
def processor() -> str:
    """The processor's model; where the system does not say, its architecture.

    Example:
        >>> len(processor()) > 0
        True
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (models or [platform.processor()])[0] or platform.machine() or "unknown"


def path() -> Path:
    """The file: `cost.json` in $RAREFY_CACHE, or in `rarefy` of the user's cache directory.

    Example:
        >>> path().name
        'cost.json'
    """
    own = os.environ.get(VARIABLE)
    if own:
        return Path(own) / "cost.json"
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(shared) / "rarefy" / "cost.json"


def measured() -> Mapping[Key, BreakEven]:
    """What the file holds; nothing, with one warning, where it is damaged or of another version."""
    try:
        stamp = path().stat()
    except OSError:
        return {}
    return _read(path(), stamp.st_mtime_ns, stamp.st_size)


# By time and size as well, because another process may write the file meanwhile.
@functools.lru_cache(maxsize=1)
def _read(file: Path, _modified: int, _size: int) -> Mapping[Key, BreakEven]:
    try:
        return _parsed(json.loads(file.read_text(encoding="utf-8")))
    # The last of them comes of brackets nested too deeply.
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        warnings.warn(
            f"{file}: not used, and the package's own cost rule is ({type(error).__name__}: {error}); "
            "`rarefy bench --calibrate` replaces it, `rarefy bench --reset` removes it",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _parsed(content: Any) -> dict[Key, BreakEven]:
    """The rules of the file; whatever is wrong with it raises a ValueError, TypeError or KeyError."""
    if content["schema"] != SCHEMA:
        raise ValueError(f"schema {content['schema']} instead of {SCHEMA}")
    return {Key(**entry["key"]): _checked(BreakEven(**entry["rule"])) for entry in content["entries"]}


def _checked(rule: BreakEven) -> BreakEven:
    are_offsets = all(0 <= one <= 1e9 for one in (rule.tokens_offset, rule.dense_offset))
    are_overheads = all(0 <= one <= 1e15 for one in (rule.overhead, rule.dense_overhead))
    if not (1e-6 <= rule.limit <= 1 and are_offsets and are_overheads):
        raise ValueError(f"a rule that cannot be: {rule}")
    return rule


def save(rules: Mapping[Key, BreakEven]) -> Path:
    """Adds rules to the file; those of the same key are replaced.

    Args:
        rules: as measured.

    Returns:
        The file.

    Raises:
        RarefyError: it cannot be written.
    """
    entries = [
        {"key": dataclasses.asdict(key), "rule": dataclasses.asdict(rule)}
        for key, rule in {**measured(), **rules}.items()
    ]
    try:
        path().parent.mkdir(parents=True, exist_ok=True)
        replace_file(path(), json.dumps({"schema": SCHEMA, "entries": entries}, indent=2))
    except OSError as error:
        raise RarefyError(
            f"{path()}: cannot be written ({error.strerror}); set {VARIABLE} to another folder"
        ) from error
    return path()


def replace_file(file: Path, text: str) -> None:
    """Writes a file that others may be reading.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    # Beside the file, as a rename does not cross file systems. Not flushed: what is lost is measured again.
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        try:
            new.write(text)
            # Else a full disk would be noticed when the file is closed, which is too late to remove it.
            new.flush()
            os.replace(new.name, file)
        except OSError:
            os.unlink(new.name)
            raise


def remove() -> bool:
    """Removes the file; whether there was one.

    Raises:
        RarefyError: it cannot be removed.
    """
    try:
        path().unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RarefyError(f"{path()}: cannot be removed ({error.strerror}); remove it by hand") from error
    return True
