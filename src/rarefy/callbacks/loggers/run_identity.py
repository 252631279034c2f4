"""Which run of a tracking service a model directory belongs to, so that a resumed fit goes on in the same one."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_NOT_IN_A_NAME = re.compile(r"[^\w\-. /]")


def known_run(path: Path, global_step: int) -> str | None:
    """The run that a fit goes on with; None where it begins anew, or where the file cannot be read.

    Args:
        path: where `remember_run` wrote it.
        global_step: of the trainer when the fit begins.

    Example:
        >>> known_run(Path("no_such_file"), 100) is None
        True
    """
    if global_step == 0:
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    run = found.get("run") if isinstance(found, dict) else None
    return run if isinstance(run, str) else None


def remember_run(path: Path, run: str) -> None:
    """Writes down which run it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"run": run}), encoding="utf-8")


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of a configuration with their paths.

    Example:
        >>> list(flat({"loop": {"max_steps": 5}, "sparsity": [0.5]}))
        [('loop.max_steps', '5'), ('sparsity.0', '0.5')]
    """
    for name, value in params.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from flat(value, f"{path}.")
        elif isinstance(value, list):
            yield from flat({str(index): part for index, part in enumerate(value)}, f"{path}.")
        else:
            yield path, str(value)


def plain_name(metric: str) -> str:
    """The name of a metric with what MLflow takes: letters, digits and `_-. /`.

    Example:
        >>> plain_name("sparsity/fc*/target")
        'sparsity/fc_/target'
    """
    return _NOT_IN_A_NAME.sub("_", metric)
