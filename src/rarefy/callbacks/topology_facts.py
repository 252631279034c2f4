"""Numbers that say how a topology looks and how it moved, each a share."""

from __future__ import annotations

from torch import Tensor

from rarefy.roles import OUT_IN, Axes


def grown_share(old_mask: Tensor, new_mask: Tensor) -> float:
    """Share of the active connections that were inactive before; 0 where none is active.

    Args:
        old_mask: bool, before the update.
        new_mask: bool, after it.

    Example:
        >>> import torch
        >>> grown_share(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
        0.5
    """
    return int((new_mask & ~old_mask).count_nonzero()) / max(int(new_mask.sum()), 1)


def hamming_distance(old_mask: Tensor, new_mask: Tensor) -> float:
    """Share of the positions that are active in one of two masks alone: their Hamming distance, divided by the size.

    Args:
        old_mask: bool, before the update.
        new_mask: bool, after it.

    Example:
        >>> import torch
        >>> hamming_distance(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        0.5
    """
    return int((new_mask ^ old_mask).count_nonzero()) / max(new_mask.numel(), 1)


def dead_shares(mask: Tensor, axes: Axes = OUT_IN) -> tuple[float, float] | None:
    """Shares of the outputs and of the inputs that have no connection; None where they cannot be told apart.

    Args:
        mask: bool, of a weight [out, in, …] or as `axes` says.
        axes: how the module reads the dimensions.

    Example:
        >>> import torch
        >>> dead_shares(torch.tensor([[True, False, False, False], [False, False, False, False]]))
        (0.5, 0.75)
    """
    if mask.dim() < 2 or axes.unknown or not mask.numel():
        return None
    first = _dead(mask)
    # Of a convolution with groups, the second dimension stands for other inputs (or outputs) in each of them.
    pieces = [_dead(piece.transpose(0, 1)) for piece in mask.chunk(axes.groups)]
    second = sum(pieces) / len(pieces)
    return (second, first) if axes.transposed else (first, second)


def _dead(mask: Tensor) -> float:
    """Share of the rows without a connection."""
    return int((~mask.flatten(1).any(1)).count_nonzero()) / len(mask)
