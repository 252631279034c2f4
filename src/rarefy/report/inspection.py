"""What a saved model looks like: sparsity, balance, dead rows and columns, sizes of weights."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from rarefy import filters, masks
from rarefy.checkpoint.saved_model import SavedModel
from rarefy.config import patterns_of
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.patterns import Pattern

QUANTILES = (0.05, 0.5, 0.95)


@dataclass(frozen=True)
class Balance:
    """How evenly the groups of a weight are filled.

    Args:
        option: `balance_in_groups` or `balance_out_groups`.
        groups: how many there are.
        lowest: sparsity of the fullest group.
        highest: sparsity of the emptiest one.
    """

    option: str
    groups: int
    lowest: float
    highest: float


@dataclass(frozen=True)
class Inspected:
    """One parameter or buffer.

    Args:
        name: as in the state dict.
        shape: of the tensor.
        storage: `masked`, `csr` or `dense`.
        active: connections that are active; of a dense tensor the numbers that are not zero.
        pattern: what its mask obeys inside its groups, as the configuration says it; empty if it does not.
        balance: of its groups; None if it has none.
        dead_rows: indices of the first dimension without an active connection; None below two dimensions.
        dead_columns: the same for the second dimension.
        quantiles: of |w| over the active connections, for each of `QUANTILES`; None where there is none.
    """

    name: str
    shape: tuple[int, ...]
    storage: str
    active: int
    pattern: str
    balance: Balance | None
    dead_rows: int | None
    dead_columns: int | None
    quantiles: tuple[float | None, ...]

    @property
    def size(self) -> int:
        """How many numbers it has when dense."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The measured fraction that is inactive; 0 for an empty tensor."""
        return 1 - self.active / self.size if self.size else 0.0

    @property
    def is_sparse(self) -> bool:
        """Whether it has a mask."""
        return self.storage != "dense"


@dataclass(frozen=True)
class Totals:
    """Sums over some parameters.

    Args:
        parameters: how many there are.
        size: numbers in them.
        active: how many of these are active.
    """

    parameters: int
    size: int
    active: int

    @classmethod
    def of(cls, rows: Iterable[Inspected]) -> Totals:
        """The sums."""
        rows = list(rows)
        return cls(len(rows), sum(row.size for row in rows), sum(row.active for row in rows))

    @property
    def sparsity(self) -> float:
        """The measured fraction that is inactive."""
        return 1 - self.active / self.size if self.size else 0.0


def inspect(saved: SavedModel) -> tuple[list[Inspected], str]:
    """Every tensor of a saved model, tied ones once.

    Args:
        saved: from `open_saved`.

    Returns:
        One entry a tensor in the order of the file, and why patterns are not known; empty if they are.

    Example:
        >>> import torch
        >>> from pathlib import Path
        >>> state = {"fc.weight": torch.eye(4), "fc.weight_mask": torch.eye(4).bool()}
        >>> [row], _ = inspect(SavedModel(Path("run"), state))
        >>> row.name, row.sparsity, row.dead_rows
        ('fc.weight', 0.75, 0)
    """
    try:
        patterns = _patterns(saved)
        problem = ""
    except RarefyError as error:
        patterns = {}
        problem = str(error)
    names = [name for name in saved.dense if name not in saved.tied]
    return [_inspected(saved, name, patterns.get(name)) for name in names], problem


def _patterns(saved: SavedModel) -> Mapping[str, Pattern]:
    """The pattern of every sparse weight, from the first entry of the `sparsity:` block that matches it."""
    block = saved.params.get("trainer", {}).get("init", {}).get("sparsity")
    if block is None:
        return {}
    with warnings.catch_warnings():
        # What they say of the file was said when the run began.
        warnings.simplefilter("ignore")
        rules = patterns_of(block)
    return {name: _pattern_of(name, saved.state[name], rules) for name in saved.masks}


def _pattern_of(
    name: str, weight: Tensor, rules: Sequence[tuple[tuple[str, ...] | None, Pattern]]
) -> Pattern:
    # A file may hold whole numbers, which cannot want a gradient.
    parameter = nn.Parameter(weight, requires_grad=False)
    candidate = Candidate(name, parameter, (), requires_dense=False)
    matching = (pattern for globs, pattern in rules if filters.decide(candidate, globs).sparse)
    pattern = next(matching, Pattern())
    pattern.check(name, weight.shape)
    return pattern


def _inspected(saved: SavedModel, name: str, pattern: Pattern | None) -> Inspected:
    weight = saved.state[name]
    active = saved.active(name)
    rows, columns = _dead(active)
    return Inspected(
        name=name,
        shape=tuple(weight.shape),
        storage=saved.storage if name in saved.masks else "dense",
        active=int(active.sum()),
        pattern="" if pattern is None else str(pattern.structure),
        balance=None if pattern is None else _balance(active, pattern),
        dead_rows=rows,
        dead_columns=columns,
        quantiles=quantiles(weight[active].abs(), QUANTILES),
    )


def _dead(active: Tensor) -> tuple[int | None, int | None]:
    if active.dim() < 2:
        return None, None
    cells = active.flatten(2).any(2) if active.dim() > 2 else active
    return int((~cells.any(1)).sum()), int((~cells.any(0)).sum())


def _balance(active: Tensor, pattern: Pattern) -> Balance | None:
    if pattern.axis is None:
        return None
    sparsities = [masks.sparsity_of(piece) for piece in pattern.split(active)]
    return Balance(pattern.key, pattern.groups, min(sparsities), max(sparsities))


def quantiles(values: Tensor, shares: Sequence[float]) -> tuple[float | None, ...]:
    """Values at given shares of the way from the smallest to the largest; None where that is no number.

    Example:
        >>> import torch
        >>> quantiles(torch.tensor([3.0, 1.0, 2.0]), (0.0, 0.5)), quantiles(torch.tensor([]), (0.5,))
        ((1.0, 2.0), (None,))
    """
    if not values.numel() or not values.is_floating_point():
        return tuple(None for _ in shares)
    flat = values.flatten().float() if values.element_size() < 4 else values.flatten()
    places = [1 + round(share * (flat.numel() - 1)) for share in shares]
    # torch.quantile refuses more than 16 million numbers.
    found = [float(flat.kthvalue(place).values) for place in places]
    return tuple(value if math.isfinite(value) else None for value in found)
