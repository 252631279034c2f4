"""What growing needs of a dense gradient: its highest entries, where they are fewer than all."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from rarefy.storage.gradients import Shortlist
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.ranking import Score, highest_entries


@dataclass(frozen=True)
class GrowthRequest:
    """Asks for so many of the highest entries of a dense gradient that growing can do without the rest.

    Args:
        score: ranks each entry by itself; connections are grown by it, and by nothing else.
        counts: weight → the most connections that may be grown in each of its pieces.
    """

    score: Score
    counts: Callable[[SparseParameter], Sequence[int]]

    def shorten(self, parameter: SparseParameter, grad: Tensor) -> Tensor | Shortlist:
        """What has to be held of `grad`: a shortlist where it is smaller."""
        counts = self.counts(parameter)
        split = parameter.pattern.split
        pieces = zip(split(grad), split(parameter.mask), counts, strict=True)
        listed = parameter.pattern.merge(
            [highest_entries(piece, mask, count, self.score) for piece, mask, count in pieces]
        )
        is_smaller = Shortlist.is_smaller(grad, int(listed.count_nonzero()))
        return Shortlist.of(grad, listed, counts) if is_smaller else grad
