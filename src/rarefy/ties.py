"""Which of several equal scores wins: a seeded order of the places in a weight, made only where there is a tie."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

# SplitMix64's increment, and the two factors of its finalizer.
_GOLDEN = 0x9E3779B97F4A7C15
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


@dataclass(frozen=True)
class TieOrder:
    """An order of places that looks random, takes no memory, and is the same on every device.

    The key of a place is a bijection of 64-bit numbers (the finalizer of SplitMix64), so two places never tie again.

    Args:
        seed: another seed is another order.
        places: where the entries stand in the weight, for a selection among a part of it; None for the whole weight.

    Example:
        >>> order = TieOrder(3)
        >>> bool((order.keys(torch.arange(99)).unique().numel() == torch.tensor(99)))
        True
    """

    seed: int = 0
    places: Tensor | None = None

    @classmethod
    def of(cls, generator: torch.Generator) -> TieOrder:
        """The order that belongs to a generator's seed; nothing is drawn from it."""
        return cls(generator.initial_seed())

    def keys(self, entries: Tensor) -> Tensor:
        """The key of each entry; of equal scores the ones with the lowest keys win.

        Args:
            entries: int64, indices of the flattened scores.
        """
        places = entries if self.places is None else self.places[entries].long()
        return _mixed(places + self.start)

    @property
    def start(self) -> int:
        """What is added to a place before it is mixed, a signed number of 64 bits; compiled code makes the same keys.

        Example:
            >>> TieOrder(-1).start
            0
        """
        return _signed(self.seed * _GOLDEN + _GOLDEN)

    def among(self, places: Tensor) -> TieOrder:
        """The same order, for scores that belong to these places of the weight."""
        return replace(self, places=places)

    def other(self) -> TieOrder:
        """An unlike order: what is dropped first shall not be what grows last."""
        return replace(self, seed=self.seed ^ (_GOLDEN >> 1))


DEFAULT_ORDER = TieOrder()


def settle(kept: Tensor, scores: Tensor, candidates: Tensor, order: TieOrder) -> Tensor:
    """The same choice of the highest scores, with the tie at its border decided by `order`.

    Args:
        kept: bool, 1-D: the highest scores, ties decided somehow.
        scores: shape of `kept`; NaN ranks below everything.
        candidates: bool, what could have been kept.
        order: decides among equals.

    Returns:
        A mask with as many entries; `kept` itself where nothing ties.

    Example:
        >>> ones = torch.ones(4)
        >>> settle(ones > 1, ones, ones > 0, TieOrder()).any()
        tensor(False)
    """
    # The lowest of no scores is an error in torch.
    lowest = scores[kept].amin() if kept.any() else scores.new_tensor(torch.inf)
    tied = (candidates & _equal(scores, lowest)).nonzero().squeeze(1)
    was_kept = kept[tied]
    count = int(was_kept.count_nonzero())
    if count in (0, len(tied)):
        return kept
    keys = order.keys(tied)
    settled = kept.clone()
    # No two keys are equal, so exactly `count` win.
    settled[tied] = keys <= keys.kthvalue(count).values
    return settled


def settle_rows(
    kept: Tensor, scores: Tensor, candidates: Tensor | None, contested: Tensor, order: TieOrder
) -> Tensor:
    """The same for each row of a matrix, where it is known which rows are contested.

    Args:
        kept: bool [rows, columns]: the highest scores of each row, ties decided somehow.
        scores: shape of `kept`.
        candidates: bool, what could have been kept; None for everything.
        contested: bool [rows], which keep some of several equal scores and leave others.
        order: decides among equals.

    Example:
        >>> kept = torch.tensor([[True, False], [True, False]])
        >>> settle_rows(kept, torch.ones(2, 2), None, torch.tensor([True, False]), TieOrder()).int().sum(1)
        tensor([1, 1])
    """
    rows = contested.nonzero().squeeze(1)
    if not len(rows):
        return kept
    inside = kept[rows]
    some = scores[rows]
    # NaN where one is kept, and rightly so: it ranks lowest, so the border lies among the NaN.
    lowest = torch.where(inside, some, torch.inf).amin(1, keepdim=True)
    tied = _equal(some, lowest)
    settled = kept.clone()
    settled[rows] = _settled_rows(
        inside, tied if candidates is None else tied & candidates[rows], rows, order
    )
    return settled


def _equal(scores: Tensor, lowest: Tensor) -> Tensor:
    """NaN equals NaN."""
    return (
        torch.where(lowest.isnan(), scores.isnan(), scores == lowest)
        if lowest.isnan().any()
        else scores == lowest
    )


def _settled_rows(kept: Tensor, tied: Tensor, rows: Tensor, order: TieOrder) -> Tensor:
    """Rows whose ties are open."""
    row, column = tied.nonzero(as_tuple=True)
    keys = order.keys(rows[row] * kept.shape[1] + column)
    # By row, within it by key: two stable sorts, the one that matters less first.
    by_key = keys.argsort()
    sequence = by_key[row[by_key].argsort(stable=True)]
    sizes = tied.sum(1)
    rank = torch.arange(len(sequence), device=kept.device) - (sizes.cumsum(0) - sizes)[row[sequence]]
    wins = sequence[rank < (tied & kept).sum(1)[row[sequence]]]
    settled = kept & ~tied
    settled[row[wins], column[wins]] = True
    return settled


def _mixed(number: Tensor) -> Tensor:
    """SplitMix64's finalizer in wrapping 64-bit arithmetic."""
    for shift, factor in zip((30, 27), _FACTORS, strict=True):
        number = (number ^ _shifted(number, shift)) * _signed(factor)
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; torch's copies the sign."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """The lowest 64 bits as a signed number."""
    low = number & ((1 << 64) - 1)
    return low - (1 << 64) if low >> 63 else low
