"""The generator of docs/matrix.md, asked once a session for each combination, and options under which one can run."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType
from typing import Any

from contract_rows import ROWS, options_of, takes
from document_blocks import DOCS
from rarefy.patterns import parse_pattern


def generator() -> ModuleType:
    path = DOCS / "scripts" / "matrix.py"
    spec = importlib.util.spec_from_file_location("matrix", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.tried = functools.cache(module.tried)  # pyright: ignore[reportAttributeAccessIssue]
    return module


MATRIX = generator()


def works(method: str, key: str, distribution: str, compute: str = "masked") -> bool:
    """Whether the page says so."""
    return not MATRIX.tried(MATRIX.Combination(method, key, distribution, compute)).reason


def options(method: str, key: str, distribution: str, compute: str, seed: int) -> dict[str, Any]:
    """What a method is built with, so that its masks move and two small layers reach the sparsity."""
    pattern = MATRIX.PATTERNS[key]
    highest = min(parse_pattern(pattern, None, None).structure.highest_sparsity, 0.75)
    # All blocks of the small layer would lose against the large one.
    highest = 0.25 if distribution == "global" else highest
    found = {**options_of(method), "pattern": pattern, "compute": compute, "seed": seed}
    found["distribution"] = distribution
    rising = {"type": "polynomial", "init": 0.0, "final": highest, "start": 0, "stop": 4}
    found["sparsity"] = rising if ROWS[method].sparsity == "scheduled" else highest
    return {**found, "drop_fraction": 0.6} if takes(method, "drop_fraction") else found
