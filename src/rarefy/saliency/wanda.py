"""Wanda: magnitudes times the norms of what connections are multiplied with."""

from __future__ import annotations

from torch import Tensor


def wanda_scores(weight: Tensor, squares: Tensor) -> Tensor:
    """Magnitude times the norm of the input of each connection (Sun et al., arXiv:2306.11695).

    score = |w| · ‖x‖₂, to be compared within an output

    Args:
        weight: any shape.
        squares: Σ x² over all inputs seen, ≥ 0, float32 or wider, of a shape that broadcasts to that of `weight`.

    Returns:
        float32 or wider, of the shape of `weight`; higher = keep.

    Example:
        >>> import torch
        >>> wanda_scores(torch.tensor([[2.0, -1.0]]), torch.tensor([[1.0, 9.0]])).tolist()
        [[2.0, 3.0]]
    """
    return weight.to(squares.dtype).abs() * squares.sqrt()
