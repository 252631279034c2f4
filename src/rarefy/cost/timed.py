"""Layers of the model in training, timed once where the rule does not know this machine or may be wrong about it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from rarefy.cost.calibration import VARIABLE as FOLDER
from rarefy.cost.calibration import Key, key_of, path, replace_file
from rarefy.cost.measure import Case, measure
from rarefy.cost.rule import pays_off, relative_time, rule

VARIABLE = "RAREFY_CALIBRATE"
_SECONDS = 20.0  # for all the layers of a model
_SECONDS_A_LAYER = 0.2
_GRID = 50  # densities are told apart by fiftieths: a run that drifts a little asks for nothing new
_LEAST = 2e7  # multiply-adds of a dense layer that takes about as long as the calls around it
_DOUBTFUL = 2.0  # a rule that expects a factor of more than this either way is not wrong about the sign
_LOGGER = logging.getLogger("rarefy")


@dataclass(frozen=True)
class Layer:
    """A sparse layer as the rule sees it.

    Args:
        rows: output features.
        columns: input features.
        tokens: rows of the activations.
        density: share of active connections, in [0, 1].
        dtype: of the activations.
        block: of the weight; None for single connections.
    """

    rows: int
    columns: int
    tokens: int
    density: float
    dtype: torch.dtype = torch.float32
    block: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        """As the file has it."""
        block = "x".join(map(str, self.block or (1, 1)))
        density = round(self.density * _GRID) / _GRID
        return f"{self.rows}x{self.columns} tokens {self.tokens} density {density:g} block {block}"

    @property
    def key(self) -> Key:
        """The machine, and how it computes such a layer."""
        return key_of(self.dtype, self.block)

    def is_expected_to_pay(self) -> bool:
        """What the rule says."""
        return pays_off(self.rows, self.columns, self.tokens, self.density, self.dtype, self.block)

    def is_doubtful(self, *, has_run: bool) -> bool:
        """Whether timing it may change what the rule says.

        Args:
            has_run: a rule that knows this machine is believed for the first steps.
        """
        if self.rows * self.columns * self.tokens < _LEAST or not 0 < self.density <= 0.75:
            return False
        if self.dtype not in (torch.float32, torch.bfloat16):
            return False
        if rule(self.dtype, self.block) is None:
            return True
        expected = relative_time(self.rows, self.columns, self.tokens, self.density, self.dtype, self.block)
        return has_run and 1 / _DOUBTFUL < expected < _DOUBTFUL


def is_on() -> bool:
    """Whether layers may be timed: unless RAREFY_CALIBRATE is 0."""
    return os.environ.get(VARIABLE) != "0"


def timed(layer: Layer) -> float | None:
    """The time of a sparse layer measured on this machine, dense = 1; None where it never was, or may not be used.

    Args:
        layer: what it is asked for; its density counts to the nearest fiftieth.

    Example:
        >>> timed(Layer(3, 5, 7, 0.5)) is None
        True
    """
    return _read().get(_entry(layer)) if is_on() else None


def time_layers(layers: Iterable[Layer]) -> None:
    """Times those that never were, for 20 seconds at most, and keeps what was found in a file of the user.

    Numbers at random that training draws, and the gradients that it holds, stay what they are.

    Args:
        layers: of one model; what is not reached in time is left to the rule.
    """
    known = _read()
    # The last of a name stands for all of it: their densities are as good as the same.
    wanted = {_entry(one): one for one in layers if _entry(one) not in known}
    # What cannot be kept would be timed again at every update.
    if not wanted or not is_on() or not _write({}):
        return
    _LOGGER.info(
        "timing %d kinds of sparse layers for compute: auto, once on this machine and for %.0f seconds at most "
        "(%s=0 turns it off)",
        len(wanted),
        _SECONDS,
        VARIABLE,
    )
    stop = time.monotonic() + _SECONDS
    found = {}
    # With gradients, which an update runs without: forward and backward pass are what is timed.
    with torch.random.fork_rng(devices=[]), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        for entry, layer in wanted.items():
            if time.monotonic() < stop:
                found[entry] = _relative_time(layer)
    _write(found)


def _relative_time(layer: Layer) -> float:
    sparsity = 1 - layer.density
    case = Case(layer.rows, layer.columns, layer.tokens, sparsity, layer.dtype, layer.block)
    relative = measure(case, _SECONDS_A_LAYER).relative_time
    _LOGGER.info("%s, %s: %.2f of dense", layer.name, layer.key.dtype, relative)
    return relative


def _entry(layer: Layer) -> str:
    """All that a time holds for, as one line of text."""
    return ", ".join([layer.name, *map(str, dataclasses.astuple(layer.key))])


def _file() -> Path:
    return path().with_name("timed.json")


def _read() -> Mapping[str, float]:
    """What the file holds; nothing where it cannot be used, since it is only times, and they can be taken again."""
    try:
        stamp = _file().stat()
    except OSError:
        return {}
    return _parsed(_file(), stamp.st_mtime_ns, stamp.st_size)


# By time and size as well, because another process may write the file meanwhile.
@functools.lru_cache(maxsize=1)
def _parsed(file: Path, _modified: int, _size: int) -> Mapping[str, float]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict):
        return {}
    return {name: time for name, time in content.items() if isinstance(time, float) and time > 0}


def _write(found: Mapping[str, float]) -> bool:
    """Adds to what the file holds now, since other processes write it too; whether it could be written."""
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        replace_file(_file(), json.dumps({**_read(), **found}, indent=2))
    except OSError as error:
        warnings.warn(
            f"{_file()}: cannot be written ({error.strerror}), so compute: auto goes by its rule alone; set "
            f"{FOLDER} to another folder, or {VARIABLE}=0 to have no layers timed",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True
