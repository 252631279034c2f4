"""From one network-wide sparsity to one sparsity per parameter."""

from __future__ import annotations

from collections.abc import Sequence

from rarefy.errors import ConfigError
from rarefy.validation import shorten

_PLANNED = ("er", "erk")


def uniform(sparsity: float, shapes: Sequence[Sequence[int]]) -> list[float]:
    """The same sparsity for every parameter.

    Args:
        sparsity: network-wide sparsity, in [0, 1].
        shapes: the shapes of the sparse parameters.

    Returns:
        One sparsity per shape.

    Example:
        >>> uniform(0.9, [(8, 8), (16, 4)])
        [0.9, 0.9]
    """
    return [sparsity] * len(shapes)


DISTRIBUTIONS = {"uniform": uniform}


def check_distribution(name: object) -> str:
    """The name of a distribution, checked.

    Raises:
        ConfigError: an unknown name, or one that is planned but not available yet.
    """
    if name in _PLANNED:
        raise ConfigError("distribution", f"{name} (not available yet)", "uniform", "distribution: uniform")
    if not isinstance(name, str) or name not in DISTRIBUTIONS:
        raise ConfigError("distribution", shorten(name), "uniform", "distribution: uniform")
    return name
