"""What the tests of every algorithm need to know of each: one row a method, beside what its class says itself."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from rarefy.config import accepted_options
from rarefy.methods.registry import ALGORITHMS


@dataclass(frozen=True)
class Row:
    """How a method is run.

    Args:
        sparsity: whether it takes any sparsity, a `constant` one only, or a `scheduled` one only.
        options: that it has to be given beside sparsity.
        rises: whether its sparsity must not fall.
        moves: whether its masks change.
        refuses: patterns that it refuses.
    """

    sparsity: Literal["any", "constant", "scheduled"] = "any"
    options: Mapping[str, Any] = field(default_factory=dict)
    rises: bool = False
    moves: bool = True
    refuses: Callable[[Any], bool] = field(default=lambda pattern: False)


def has_one_connection(pattern: Any) -> bool:
    return isinstance(pattern, dict) and pattern.get("n") == 1


def is_approximated(pattern: Any) -> bool:
    return isinstance(pattern, dict) and bool(pattern.get("transposable")) and pattern["m"] > 4


def is_no_fan_in(pattern: Any) -> bool:
    return pattern != "fan_in"


ROWS: Mapping[str, Row] = {
    "static": Row("constant", moves=False),
    "gmp": Row("scheduled"),
    "set": Row(),
    "rigl": Row(),
    "mest": Row(),
    "movement": Row("scheduled"),
    "powerprop": Row("scheduled", rises=True, refuses=is_approximated),
    # A list, so that it is no error where a test asks for a higher sparsity.
    "top_kast": Row(options={"forward_sparsity": [0.9]}, refuses=has_one_connection),
    "granet": Row("scheduled"),
    "srigl": Row(refuses=is_no_fan_in),
    "ac_dc": Row("constant", {"update": {"freq": 2, "stop": 12}}),
}


@functools.cache
def takes(name: str, option: str) -> bool:
    return option in accepted_options(ALGORITHMS[name])


def options_of(name: str) -> dict[str, Any]:
    """Options under which a method can run, with frequent updates where it has any."""
    options: dict[str, Any] = {"sparsity": 0.75}
    if takes(name, "update"):
        options["update"] = {"freq": 2}
    if ROWS[name].sparsity == "scheduled":
        options["sparsity"] = {"type": "polynomial", "init": 0.2, "final": 0.9, "start": 0, "stop": 10}
    return {**options, **ROWS[name].options}


def aiming_at(name: str, target: float) -> dict[str, Any]:
    """A sparsity that is `target` in the first mask."""
    if ROWS[name].sparsity != "scheduled":
        return {"sparsity": target}
    return {"sparsity": [target, (target + 1) / 2 if ROWS[name].rises else target / 2]}


def kept_of(name: str, shape: Sequence[int], target: float) -> int:
    """How many connections of a weight, or of a balanced group of it, are active; at least one."""
    if takes_pattern(name, "unstructured"):
        return max(1, round((1 - target) * math.prod(shape)))
    return shape[0] * max(1, round((1 - target) * math.prod(shape[1:])))


def takes_pattern(name: str, pattern: Any) -> bool:
    return not ROWS[name].refuses(pattern)
