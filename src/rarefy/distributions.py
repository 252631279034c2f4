"""From one network-wide sparsity to one sparsity per parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rarefy.errors import ConfigError
from rarefy.validation import shorten

Shapes = Sequence[Sequence[int]]


def uniform(sparsity: float, shapes: Shapes) -> list[float]:
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


def er(sparsity: float, shapes: Shapes) -> list[float]:
    """Erdős–Rényi (Mocanu et al., arXiv:1707.04780): small weights stay denser than large ones.

    density = ε · (n_in + n_out) / (n_in · n_out), with ε such that as many connections are active in all as with
    `uniform`. Where that is above 1 the parameter is dense, and ε is found again for the others. n_out and n_in are
    the dimensions 0 and 1 of a weight [out, in, …]: a convolution's channels, whatever the size of its kernel.

    Args:
        sparsity: network-wide sparsity, in [0, 1].
        shapes: the shapes of the sparse parameters.

    Returns:
        One sparsity per shape, in [0, 1].

    Example:
        >>> [round(share, 3) for share in er(0.9, [(100, 100), (10, 10)])]
        [0.908, 0.082]
    """
    return _shared_out(sparsity, shapes, [_sum_to_product(shape[:2]) for shape in shapes])


def erk(sparsity: float, shapes: Shapes) -> list[float]:
    """Erdős–Rényi kernel (Evci et al., arXiv:1911.11134): as `er`, with the kernels of convolutions.

    density = ε · (sum of all dimensions) / (product of all dimensions). For matrices it is the same as `er`.

    Args:
        sparsity: network-wide sparsity, in [0, 1].
        shapes: the shapes of the sparse parameters.

    Returns:
        One sparsity per shape, in [0, 1].

    Example:
        >>> [round(share, 3) for share in erk(0.9, [(64, 64, 3, 3), (64, 64)])]
        [0.943, 0.511]
    """
    return _shared_out(sparsity, shapes, [_sum_to_product(shape) for shape in shapes])


def by_competition(sparsity: float, shapes: Shapes) -> list[float]:
    """How `global` begins: as `uniform`, until an update lets the scores of all connections compete.

    Args:
        sparsity: of all the parameters together, in [0, 1].
        shapes: of the parameters.

    Example:
        >>> by_competition(0.9, [(8, 8)])
        [0.9]
    """
    return uniform(sparsity, shapes)


GLOBAL = "global"
DISTRIBUTIONS = {"uniform": uniform, "er": er, "erk": erk, GLOBAL: by_competition}


def share_out(distribution: str, sparsity: float, shapes: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """The sparsity of each parameter, by name.

    Args:
        distribution: its name.
        sparsity: of all the parameters together, in [0, 1].
        shapes: of the parameters.

    Example:
        >>> share_out("uniform", 0.9, {"fc.weight": (8, 8)})
        {'fc.weight': 0.9}
    """
    return dict(zip(shapes, DISTRIBUTIONS[distribution](sparsity, list(shapes.values())), strict=True))


def check_distribution(name: object) -> str:
    """The name of a distribution, checked.

    Raises:
        ConfigError: an unknown name.

    Example:
        >>> check_distribution("erk")
        'erk'
    """
    if not isinstance(name, str) or name not in DISTRIBUTIONS:
        raise ConfigError("distribution", shorten(name), "uniform, er, erk or global", "distribution: erk")
    return name


def _sum_to_product(sizes: Sequence[int]) -> float:
    return sum(sizes) / math.prod(sizes) if math.prod(sizes) else 0.0


def _shared_out(sparsity: float, shapes: Shapes, weights: Sequence[float]) -> list[float]:
    """Sparsities whose densities are min(1, ε · weight)."""
    scale = _scale(1.0 - sparsity, [math.prod(shape) for shape in shapes], weights)
    # An empty weight has no density (∞ · 0 is none); rounding may leave ε a little below 0.
    return [1.0 - min(1.0, max(0.0, scale * weight)) if weight else sparsity for weight in weights]


def _scale(density: float, sizes: Sequence[int], weights: Sequence[float]) -> float:
    """The ε at which Σ size · min(1, ε · weight) = density · Σ size."""
    left = density * sum(sizes)
    dense = set[int]()
    while True:
        shares = {i: size * weights[i] for i, size in enumerate(sizes) if i not in dense}
        if not sum(shares.values()):
            # All are dense, or empty: whatever is large enough will do.
            return math.inf
        scale = (left - sum(sizes[i] for i in dense)) / sum(shares.values())
        # What a dense weight cannot take goes to the others and may fill
        # them too; `dense` only grows, so this ends.
        above = {i for i in shares if scale * weights[i] > 1.0}
        if not above:
            return scale
        dense |= above
