"""Scores of a dense gradient's entries, each ranked by itself, in parts that fit into a cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Score = Callable[[Tensor], Tensor]

# A megabyte of float32: the second-level cache of most processors.
_PART = 1 << 18
_SAMPLED_FROM = 1 << 18
_SAMPLES = 1 << 16


def ranked_in_place(grad: Tensor, score: Score) -> Tensor:
    """The score of every entry, written over the gradient part by part: fresh memory costs more than the scores.

    Args:
        grad: no one else needs it; left alone where the scores have another dtype.
        score: ranks every entry by itself.

    Example:
        >>> ranked_in_place(torch.tensor([1.0, -2.0]), torch.abs)
        tensor([1., 2.])
    """
    parts = _parts(grad)
    if score(parts[0]).dtype != grad.dtype:
        return score(grad)
    for part in parts:
        part.copy_(score(part))
    return grad


def highest_entries(grad: Tensor, mask: Tensor, count: int, score: Score) -> Tensor:
    """All entries from some score upwards, `count` inactive ones among them, or some more.

    Args:
        grad: the gradient of a weight, or of a balanced group of it.
        mask: bool, the active connections.
        count: at least so many inactive ones; 0 gives an empty mask.
        score: ranks every entry by itself.

    Returns:
        Bool, the shape of `grad`; everything where no such score was found, because of NaN for example.

    Example:
        >>> grad, mask = torch.tensor([3.0, 0.5, 1.0, 2.0, -4.0]), torch.tensor([True, True, False, False, False])
        >>> highest_entries(grad, mask, 2, torch.abs)
        tensor([ True, False, False,  True,  True])
    """
    if count == 0:
        return torch.zeros_like(mask)
    lowest = _score_of_rank(count, grad.reshape(-1), ~mask.reshape(-1), score)
    chosen = torch.cat([score(part) >= lowest for part in _parts(grad)])
    # The sample may have misled, or NaN taken the place of scores.
    is_enough = int((chosen > mask).count_nonzero()) >= count
    return chosen if is_enough else torch.ones_like(mask)


def _score_of_rank(rank: int, grad: Tensor, inactive: Tensor, score: Score) -> Tensor:
    """The inactive entries' score of a rank; of a large gradient a lower one, by all odds, from a sample."""
    if grad.numel() > _SAMPLED_FROM:
        # Seeded anew each time: a run must draw the same random numbers whether it keeps lists or not.
        places = torch.randint(
            grad.numel(), (_SAMPLES,), generator=torch.Generator().manual_seed(0), device="cpu"
        )
        wanted = rank / grad.numel() * _SAMPLES
        grad = grad[places]
        inactive = inactive[places]
        # Five standard deviations further down, so that hardly any sample
        # misleads; one that does costs memory, not truth.
        rank = math.ceil(wanted + 5 * math.sqrt(wanted)) + 4
    scores = score(grad[inactive])
    return scores.topk(rank).values[-1] if rank <= scores.numel() else scores.new_tensor(-torch.inf)


def _parts(grad: Tensor) -> Sequence[Tensor]:
    """Views that fit into a cache."""
    # Along the first dimension, of which a part has at least one entry.
    return grad.split(max(1, _PART // grad[0].numel()))
