"""Packages that only an adapter needs."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from rarefy.errors import RarefyError


def require(extra: str, *modules: str) -> Any:
    """The first of `modules` that can be imported; those in use already come first.

    Args:
        extra: the extra of rarefy that brings one of them.
        *modules: names in order of preference.

    Raises:
        RarefyError: none can be imported.

    Example:
        >>> require("transformers", "no_such_package", "json").__name__
        'json'
    """
    reasons = []
    for name in sorted(modules, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise RarefyError(f"{'; '.join(reasons)}: pip install 'rarefy[{extra}]'")
