"""A weight of any dimensions as one matrix of outputs by inputs, and back."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_matrix(tensor: Tensor) -> Tensor:
    """[out, in, …] as [… · out, in].

    Example:
        >>> to_matrix(torch.ones(2, 3, 5)).shape
        torch.Size([10, 3])
    """
    return tensor if tensor.dim() == 2 else tensor.flatten(2).movedim(2, 0).flatten(0, 1)


def from_matrix(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """The reverse of `to_matrix`.

    Args:
        matrix: [… · out, in].
        shape: of the tensor that it was, [out, in, …].

    Example:
        >>> from_matrix(torch.ones(10, 3), (2, 3, 5)).shape
        torch.Size([2, 3, 5])
    """
    if len(shape) == 2:
        return matrix.reshape(*shape)
    return matrix.reshape(torch.Size(shape[2:]).numel(), *shape[:2]).movedim(0, 2).reshape(*shape)
