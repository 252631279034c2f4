"""A table of what is sparse: parameter, shape, target, actual, storage."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from io import StringIO

from rich.console import Console
from rich.table import Table

from rarefy.algorithms.base import Sparsifier, SparsityAlgorithm


@dataclass(frozen=True)
class SummaryRow:
    """One sparse parameter.

    Args:
        name: as in `model.named_parameters()`.
        algorithm: name of the algorithm that rules it.
        shape: of the weight.
        target: sparsity that was asked for at the latest update.
        actual: sparsity measured from the mask.
        kept: active connections, counted in the mask.
        pattern: balance and pattern of its masks.
        storage: `masked` or `compact`.
    """

    name: str
    algorithm: str
    shape: tuple[int, ...]
    target: float
    actual: float
    kept: int
    pattern: str
    storage: str


@dataclass(frozen=True)
class Summary:
    """The sparse parameters of a model; prints as a table."""

    rows: tuple[SummaryRow, ...]

    @property
    def actual_sparsity(self) -> float:
        """The measured sparsity of all sparse parameters together."""
        sizes = [_numel(row.shape) for row in self.rows]
        inactive = sum(row.actual * size for row, size in zip(self.rows, sizes, strict=True))
        return inactive / sum(sizes) if sum(sizes) else 0.0

    def __rich__(self) -> Table:
        table = Table("parameter", "algorithm", "shape", "target", "actual", "kept", "pattern", "storage")
        for row in self.rows:
            facts = " × ".join(map(str, row.shape)), f"{row.target:.4f}", f"{row.actual:.4f}", f"{row.kept:,}"
            table.add_row(row.name, row.algorithm, *facts, row.pattern, row.storage)
        total, kept = sum(_numel(row.shape) for row in self.rows), sum(row.kept for row in self.rows)
        table.add_section()
        table.add_row("all", "", f"{total:,} weights", "", f"{self.actual_sparsity:.4f}", f"{kept:,}")
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=150).print(self)
        return text.getvalue()


def summary(sparsity: Sparsifier) -> Summary:
    """What is sparse by now, per parameter.

    Args:
        sparsity: an algorithm or a group that was applied to a model.

    Returns:
        Rows and totals; `print` it for a table.

    Example:
        >>> import rarefy, torch
        >>> sparsity = rarefy.configure(0.75)
        >>> sparsity.apply(torch.nn.Linear(8, 8))
        >>> summary(sparsity).actual_sparsity
        0.75
    """
    return Summary(tuple(_rows(sparsity.algorithms)))


def _rows(algorithms: Iterable[SparsityAlgorithm]) -> Iterable[SummaryRow]:
    for algorithm in algorithms:
        kind, pattern = algorithm.name or type(algorithm).__name__, str(algorithm.pattern)
        targets = algorithm.shares(algorithm.target_sparsity)
        for name, parameter in algorithm.parameters.items():
            shape, actual = tuple(parameter.shape), parameter.actual_sparsity
            kept = round((1.0 - actual) * _numel(shape))
            yield SummaryRow(name, kind, shape, targets[name], actual, kept, pattern, parameter.storage.kind)


def _numel(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
