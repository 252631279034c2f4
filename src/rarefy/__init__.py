"""rarefy trains any PyTorch model with weight sparsity."""

from __future__ import annotations

import importlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rarefy import callbacks, masks, patterns, schedules
    from rarefy.algorithms.attachment.keeper import finalize
    from rarefy.algorithms.base import SparsityAlgorithm
    from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
    from rarefy.algorithms.group import Group
    from rarefy.algorithms.summary import summary
    from rarefy.config import configure
    from rarefy.inference.fastest import compact
    from rarefy.methods.gmp import GMP
    from rarefy.methods.rigl import RigL
    from rarefy.methods.set import SET
    from rarefy.methods.static import Static
    from rarefy.pruning.one_shot import prune
    from rarefy.trainer.trainer import Trainer

__all__ = [
    "GMP",
    "SET",
    "DynamicSparsityAlgorithm",
    "Group",
    "RigL",
    "SparsityAlgorithm",
    "Static",
    "Trainer",
    "callbacks",
    "compact",
    "configure",
    "finalize",
    "masks",
    "patterns",
    "prune",
    "schedules",
    "summary",
]

# Not imported here, or `import rarefy` would bring torch and every room along, whatever is used of it.
_HOMES = MappingProxyType(
    {
        "GMP": "rarefy.methods.gmp",
        "SET": "rarefy.methods.set",
        "DynamicSparsityAlgorithm": "rarefy.algorithms.dynamic",
        "Group": "rarefy.algorithms.group",
        "RigL": "rarefy.methods.rigl",
        "SparsityAlgorithm": "rarefy.algorithms.base",
        "Static": "rarefy.methods.static",
        "Trainer": "rarefy.trainer.trainer",
        "compact": "rarefy.inference.fastest",
        "configure": "rarefy.config",
        "finalize": "rarefy.algorithms.attachment.keeper",
        "prune": "rarefy.pruning.one_shot",
        "summary": "rarefy.algorithms.summary",
    }
)


def __getattr__(name: str) -> Any:
    """A public name or a module of rarefy, imported when it is first used."""
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    try:
        return importlib.import_module(f"rarefy.{name}")
    except ModuleNotFoundError as error:
        # A module that is there and lacks a package of its own has to say which, instead of seeming not to exist.
        if error.name != f"rarefy.{name}":
            raise
        raise AttributeError(f"module 'rarefy' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    """The names of the module, those that are not imported yet among them."""
    return sorted({*globals(), *__all__})
