"""SNIP: what each connection contributes to the loss."""

from __future__ import annotations

from torch import Tensor


def snip_scores(weight: Tensor, gradient: Tensor) -> Tensor:
    """How much the loss would change, to first order, without each connection (Lee et al., arXiv:1810.02340).

    score = |w · g|

    Args:
        weight: any shape.
        gradient: mean gradient of the loss at every position, of the shape of `weight`.

    Returns:
        float32 or wider, of the shape of `weight`; higher = keep.

    Example:
        >>> import torch
        >>> snip_scores(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])).tolist()
        [6.0, 0.5]
    """
    return (weight.to(gradient.dtype) * gradient).abs()
