"""The cost rule as a formula, and what it is fitted to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BreakEven:
    """A sparse layer's forward and backward pass, dense = 1, of one instruction set and dtype.

    density / limit · (1 + tokens_offset / tokens) + overhead / (rows · columns · tokens)

    Args:
        limit: density at which sparse and dense take equally long with many tokens.
        tokens_offset: tokens that a call costs on top of those it is given.
        overhead: fixed cost of a forward and backward call, in multiply-adds of one dense matrix product.

    Example:
        >>> round(BreakEven(0.5, 8, 4e6).relative_time(768, 768, 2048, 0.1), 3)
        0.204
    """

    limit: float
    tokens_offset: float
    overhead: float

    def relative_time(self, rows: int, columns: int, tokens: int, density: float) -> float:
        """The expected time of a layer; see the class and `rarefy.cost.rule.relative_time`."""
        of_connections = density / self.limit * (1 + self.tokens_offset / tokens)
        return of_connections + self.overhead / (rows * columns * tokens)


@dataclass(frozen=True)
class Measurement:
    """What one layer took.

    Args:
        rows: output features.
        columns: input features.
        tokens: rows of the activations.
        density: share of active connections.
        dense: seconds of the dense layer's forward and backward pass.
        sparse: seconds of the sparse layer's.
        block: of its weight; None for single connections.

    Example:
        >>> Measurement(768, 768, 2048, density=0.1, dense=0.5, sparse=0.125).relative_time
        0.25
    """

    rows: int
    columns: int
    tokens: int
    density: float
    dense: float
    sparse: float
    block: tuple[int, int] | None = None

    @property
    def relative_time(self) -> float:
        """Time of the sparse layer, dense = 1."""
        return self.sparse / self.dense
