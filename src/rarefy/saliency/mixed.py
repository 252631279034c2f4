"""A first mask of which a part is chosen by magnitude and the rest at random."""

from __future__ import annotations

from torch import Tensor

from rarefy.patterns.structures import FREE, Structure
from rarefy.ties import TieOrder


def magnitude_mixed(
    weight: Tensor, sparsity: float, share: float, noise: Tensor, order: TieOrder, structure: Structure = FREE
) -> Tensor:
    """Of the active connections a share has the largest magnitudes; the others are drawn at random from the rest.

    Args:
        weight: a piece of a weight.
        sparsity: fraction of inactive connections, in [0, 1].
        share: in [0, 1]; 1 is `topk`, 0 is `random`.
        noise: uniform numbers in [0, 1), of the shape of `weight`.
        order: decides among equal magnitudes.
        structure: what the mask looks like; with one of units (groups of n of m, blocks) the share is of units.

    Returns:
        Bool mask of the shape of `weight`.

    Example:
        >>> import torch
        >>> weight, noise = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([0.1, 0.2, 0.3, 0.9])
        >>> magnitude_mixed(weight, 0.5, 0.5, noise, TieOrder()).tolist()
        [True, False, False, True]
    """
    large = structure.keep_top(weight.abs(), 1.0 - share * (1.0 - sparsity), order)
    # What has 2 more ranks before all that is random, in blocks too, which are chosen as a whole.
    return structure.keep_top(noise + 2.0 * large, sparsity, order)
