"""GraSP: what each connection contributes to the flow of gradients."""

from __future__ import annotations

from torch import Tensor


def grasp_scores(weight: Tensor, product: Tensor) -> Tensor:
    """How much the norm of the gradient would shrink without each connection (Wang et al., arXiv:2002.07376).

    Without a connection ‖g‖² changes by S = −w · (Hg) to first order. The paper removes the highest S, so the score
    is w · (Hg): a connection whose removal would make the gradient smaller is kept.

    Args:
        weight: any shape.
        product: H · g, of the shape of `weight`.

    Returns:
        float32 or wider, of the shape of `weight`, with its sign; higher = keep.

    Example:
        >>> import torch
        >>> grasp_scores(torch.tensor([2.0, -1.0]), torch.tensor([-3.0, -0.5])).tolist()
        [-6.0, 0.5]
    """
    return weight.to(product.dtype) * product
