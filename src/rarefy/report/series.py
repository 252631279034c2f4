"""Metrics over steps, thinned so that a million points stay a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_POINTS = 600


@dataclass(frozen=True)
class Series:
    """Values over steps; each point stands for one value or for several neighbours.

    Args:
        steps: of the last value of each point, rising.
        mean: of the values.
        low: the smallest of them.
        high: the largest of them.
        weight: how many they are.
    """

    steps: np.ndarray
    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    weight: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[float] | np.ndarray, values: Sequence[float] | np.ndarray) -> Series:
        """One point a value; values that are not finite are left out.

        Example:
            >>> Series.of([1, 2, 3], [0.5, float("nan"), 0.25]).steps.tolist()
            [1.0, 3.0]
        """
        at = np.asarray(steps, dtype=np.float64)
        values = np.asarray(values, dtype=np.float64)
        finite = np.isfinite(values)
        at = at[finite]
        values = values[finite]
        return cls(at, values, values, values, np.ones_like(values))

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def is_thinned(self) -> bool:
        """Whether some point stands for several values."""
        return bool((self.weight > 1).any())

    @property
    def last(self) -> float:
        """The value of the last point."""
        return float(self.mean[-1])

    def thinned(self, most: int = MOST_POINTS) -> Series:
        """At most so many points; extremes survive in `low` and `high`, the mean in `mean`.

        Args:
            most: ≥ 1.

        Example:
            >>> thin = Series.of(range(10_000), [0.0] * 9_999 + [7.0]).thinned(100)
            >>> len(thin), float(thin.high.max()), float(thin.steps[-1])
            (100, 7.0, 9999.0)
        """
        if len(self) <= most:
            return self
        starts = np.arange(most) * len(self) // most
        weight = np.add.reduceat(self.weight, starts)
        return Series(
            self.steps[np.append(starts[1:], len(self)) - 1],
            np.add.reduceat(self.mean * self.weight, starts) / weight,
            np.minimum.reduceat(self.low, starts),
            np.maximum.reduceat(self.high, starts),
            weight,
        )


def joined(parts: Sequence[Series]) -> Series:
    """Series that follow each other as one.

    Args:
        parts: at least one, in the order of their steps.
    """
    fields = ("steps", "mean", "low", "high", "weight")
    return Series(*(np.concatenate([getattr(part, name) for part in parts]) for name in fields))
