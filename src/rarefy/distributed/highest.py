"""The highest of scores that lie in pieces, exactly, by counts instead of the scores themselves.

Scores become whole numbers of the same order. Their digits are settled from the highest to the lowest: all processes
add up how many of the numbers that are still in question have each value of the digit, and go on with those that have
the one at the border. What is exchanged depends on the width of the numbers, not on how many there are.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# 2048 counts of 8 bytes: small enough to be sent for nothing, and three digits make a float32.
DIGIT = 11

Sum = Callable[[Tensor], Tensor]


def ordered(scores: Tensor) -> Tensor:
    """Whole numbers in the order of the scores: NaN lowest of all, and both zeros the same.

    Args:
        scores: floating point.

    Returns:
        int64, of which 32 bits are used, or 64 for double precision.

    Example:
        >>> ordered(torch.tensor([-0.0, float("nan"), 1.0, 0.0, -1.0])).argsort(stable=True)
        tensor([1, 4, 0, 3, 2])
    """
    wide = scores if scores.dtype == torch.float64 else scores.float()
    kind, width = (torch.int64, 64) if wide.dtype == torch.float64 else (torch.int32, 32)
    # Adding zero makes a positive zero of a negative one.
    bits = (wide + 0.0).view(kind).long()
    highest = (1 << (width - 1)) - 1
    # The bits of a negative number rise as it falls, so all but the sign are turned over.
    keys = torch.where(bits < 0, bits ^ highest, bits)
    return keys.masked_fill(wide.isnan(), -highest - 1)


@dataclass(frozen=True)
class Border:
    """Where the highest numbers end.

    Args:
        number: the lowest of them.
        wins: how many of those that are equal to it belong to them.
        equal: how many are equal to it in all pieces.
    """

    number: int
    wins: int
    equal: int


def border(keys: Tensor, count: int, width: int, total: Sum) -> Border | None:
    """The border below the `count` highest numbers of all pieces.

    Args:
        keys: int64 [n], this piece, signed numbers of `width` bits.
        count: at least 1.
        width: 32 or 64.
        total: the sum of counts over all pieces; each must call it as often.

    Returns:
        None where there are no more than `count` numbers.

    Example:
        >>> border(torch.tensor([5, 1, 5, 9]), 2, 32, lambda counts: counts)
        Border(number=5, wins=1, equal=2)
    """
    # As numbers without a sign, so that digits have the order of the numbers.
    left = keys ^ (-(1 << 63) if width == 64 else 1 << 31)
    number = 0
    wins = count
    equal = 0
    # Digit by digit from the top: of each digit all pieces exchange how often it occurs, and what has another one
    # drops out.
    for shift in range((width - 1) // DIGIT * DIGIT, -1, -DIGIT):
        # The highest digit may be shorter than the others.
        digits = (left >> shift) & ((1 << min(DIGIT, width - shift)) - 1)
        counts = total(torch.bincount(digits, minlength=1 << DIGIT))
        from_above = counts.flip(0).cumsum(0).flip(0)
        # At the first digit alone, while all numbers are still there.
        if int(from_above[0]) <= count and shift + DIGIT >= width:
            return None
        digit = int((from_above >= wins).nonzero()[-1])
        wins -= int(from_above[digit] - counts[digit])
        left = left[digits == digit]
        number = (number << DIGIT) | digit
        equal = int(counts[digit])
    return Border(_signed(number, width), wins, equal)


def keep_top(
    scores: Tensor, candidates: Tensor | None, count: int, tie_keys: Callable[[Tensor], Tensor], total: Sum
) -> Tensor:
    """This piece of the mask of the `count` highest scores of all pieces.

    Args:
        scores: this piece, floating point.
        candidates: bool, what may be kept of it; None for everything.
        count: how many to keep in all pieces; clamped to the number of candidates.
        tie_keys: places in the flattened piece → int64; of equal scores the lowest keys win. No two are equal.
        total: the sum of counts over all pieces.

    Returns:
        Bool, the shape of `scores`.

    Example:
        >>> scores = torch.tensor([2.0, 3.0, 2.0])
        >>> keep_top(scores, None, 2, lambda places: -places, lambda counts: counts)
        tensor([False,  True,  True])
    """
    among = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    if count <= 0:
        return torch.zeros_like(among)
    keys = ordered(scores).reshape(-1)
    flat = among.reshape(-1)
    width = 64 if scores.dtype == torch.float64 else 32
    found = border(keys[flat], count, width, total)
    if found is None:
        return among.clone()
    kept = flat & (keys > found.number)
    tied = (flat & (keys == found.number)).nonzero().squeeze(1)
    kept[tied[_winners(tie_keys(tied), found, total)]] = True
    return kept.view(scores.shape)


def _winners(tie_keys: Tensor, found: Border, total: Sum) -> Tensor:
    """Which of the equal scores in this piece are kept."""
    if found.wins == found.equal:
        return torch.ones_like(tie_keys, dtype=torch.bool)
    # The lowest keys are the highest of their complements.
    last = border(~tie_keys, found.wins, 64, total)
    return torch.ones_like(tie_keys, dtype=torch.bool) if last is None else ~tie_keys >= last.number


def _signed(number: int, width: int) -> int:
    """The signed number that `border` took the sign of."""
    signed = number ^ (1 << (width - 1))
    return signed - (1 << width) if signed >> (width - 1) else signed
