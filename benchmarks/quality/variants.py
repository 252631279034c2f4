"""What is compared: dense models and every algorithm of the library, each as a `sparsity:` block."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.config import accepted_options
from rarefy.methods.gmp import GMP
from rarefy.methods.registry import ALGORITHMS

Block = dict[str, Any]
Variant = Callable[[float, int], Block | None]

# One topology update in this many parts of a run, the last of them at three quarters.
UPDATES = 40
STOP = 0.75
DROP = 0.3


def update_block(steps: int, start: int = 0) -> Block:
    return {"freq": max(steps // UPDATES, 1), "start": start, "stop": int(STOP * steps)}


def moving(algorithm: str, **options: Any) -> Variant:
    """Drops and grows, with a drop fraction that falls along a cosine."""

    def block(sparsity: float, steps: int) -> Block:
        drop = falling(DROP, steps)
        update = update_block(steps)
        return {
            "algorithm": algorithm,
            "sparsity": sparsity,
            "update": update,
            "drop_fraction": drop,
            **options,
        }

    return block


def falling(init: float, steps: int) -> Block:
    """A drop fraction that falls along a cosine."""
    return {"type": "cosine", "init": init, "half_period": int(STOP * steps)}


def gradual(algorithm: str, **options: Any) -> Variant:
    """Sparsity rises by Zhu and Gupta's cubic, from a tenth to three quarters of the run."""

    def block(sparsity: float, steps: int) -> Block:
        first, last = steps // 10, int(STOP * steps)
        rise = {"type": "polynomial", "init": 0.0, "final": sparsity, "start": first, "stop": last}
        every = max(steps // UPDATES, 1)
        # The last update has to come when the schedule has reached its end.
        marks = sorted({*range(first, last, every), last})
        return {"algorithm": algorithm, "sparsity": rise, "update": {"steps": marks}, **options}

    return block


def fixed(**options: Any) -> Variant:
    """The mask of the first step, for good."""
    return lambda sparsity, steps: {"algorithm": "static", "sparsity": sparsity, **options}


def top_kast(sparsity: float, steps: int) -> Block:
    """Forward passes, and the finished model, at the sparsity of the line; twice as many connections are trained."""
    trained = max(1 - 2 * (1 - sparsity), 0.0)
    shared = {"algorithm": "top_kast", "update": update_block(steps)}
    return {**shared, "sparsity": trained, "forward_sparsity": sparsity}


def granet(sparsity: float, steps: int) -> Block:
    """From half sparse, as in the paper's sparse-to-sparse form, with its drop fraction."""
    first = min(0.5, sparsity / 2)
    rise = {"type": "polynomial", "init": first, "final": sparsity, "start": 0, "stop": int(STOP * steps)}
    every = max(steps // UPDATES, 1)
    marks = sorted({*range(0, int(STOP * steps), every), int(STOP * steps)})
    drop = falling(0.5, steps)
    return {"algorithm": "granet", "sparsity": rise, "update": {"steps": marks}, "drop_fraction": drop}


def ac_dc(sparsity: float, steps: int) -> Block:
    """A tenth of the run dense, then phases of a tenth each; the last quarter and more is compressed."""
    phases = {"freq": max(steps // 10, 1), "start": steps // 10, "stop": int(STOP * steps)}
    return {"algorithm": "ac_dc", "sparsity": sparsity, "update": phases}


def any_other(name: str) -> Variant:
    """An algorithm that this file does not know better: its own defaults, on the common update schedule."""
    kind = ALGORITHMS[name]
    if issubclass(kind, GMP):
        return gradual(name)
    if "drop_fraction" in accepted_options(kind):
        return moving(name)

    def block(sparsity: float, steps: int) -> Block:
        update = {"update": update_block(steps)} if issubclass(kind, DynamicSparsityAlgorithm) else {}
        return {"algorithm": name, "sparsity": sparsity, **update}

    return block


KNOWN: dict[str, Variant] = {
    "dense": lambda sparsity, steps: None,
    "dense, narrow": lambda sparsity, steps: None,
    "static": fixed(),
    "static, ERK": fixed(distribution="erk"),
    "set": moving("set"),
    "set, ERK": moving("set", distribution="erk"),
    "rigl": moving("rigl"),
    "rigl, ERK": moving("rigl", distribution="erk"),
    "gmp": gradual("gmp"),
    "top_kast": top_kast,
    "granet": granet,
    "ac_dc": ac_dc,
}
VARIANTS: Mapping[str, Variant] = KNOWN | {name: any_other(name) for name in ALGORITHMS if name not in KNOWN}
