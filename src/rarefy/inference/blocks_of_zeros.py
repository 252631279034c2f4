"""The blocks that a mask consists of, where nobody says which: a finalized or loaded weight knows no pattern."""

from __future__ import annotations

from typing import TypeAlias

from torch import Tensor

from rarefy.kernels import whole_blocks

Block: TypeAlias = tuple[int, int]
_SIDES = (64, 32, 16, 8)  # of what the kernels take; larger blocks consist of these


def block_of(mask: Tensor) -> Block | None:
    """The largest blocks of which a mask consists, among those that there are kernels for.

    Args:
        mask: bool [out, in].

    Returns:
        Outputs and inputs of a block; None where it does not consist of any.

    Example:
        >>> import torch
        >>> block_of(torch.eye(4, dtype=torch.bool).repeat_interleave(16, 0).repeat_interleave(8, 1))
        (16, 8)
        >>> block_of(torch.eye(16, dtype=torch.bool)) is None
        True
    """
    # One look is enough for nearly all masks.
    if whole_blocks(mask, (_SIDES[-1], _SIDES[-1])) is None:
        return None
    sizes = sorted(((r, c) for r in _SIDES for c in _SIDES), key=lambda one: one[0] * one[1], reverse=True)
    return next(size for size in sizes if whole_blocks(mask, size) is not None)
