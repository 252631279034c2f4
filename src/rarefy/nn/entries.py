"""What belongs to single connections: values, gradients and optimizer state, when the topology changes."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def move_entries(tensor: Tensor, sources: Tensor) -> Tensor:
    """Moves per-connection entries (values, gradients, optimizer state) to a new topology; new ones are zero.

    Args:
        tensor: [old connections].
        sources: int64 [new connections], from `SparseLinear.set_topology`: old place, −1 = new connection.

    Returns:
        [new connections], the dtype of tensor.

    Example:
        >>> move_entries(torch.tensor([5.0, 7.0]), torch.tensor([1, -1, 0]))
        tensor([7., 0., 5.])
    """
    padded = torch.cat([tensor.new_zeros(1), tensor])
    return padded.index_select(0, sources + 1)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Gives a parameter data of another shape; it stays the same object for optimizers and hooks, without gradient.

    Autograd remembers the old shape until the dtype changes, so it does for a moment. A backward pass through a graph
    from before is refused, as after any change in place.

    Example:
        >>> parameter = nn.Parameter(torch.ones(2, 2))
        >>> replace_data(parameter, torch.zeros(3))
        >>> parameter.shape
        torch.Size([3])
    """
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.grad = None
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
    torch.autograd.graph.increment_version(parameter)
