"""Weights that are cut in pieces, of which each process holds one."""

from __future__ import annotations

import sys

from torch import Tensor

from rarefy.torch_private import is_part_of_a_flat_parameter


def cut_by(weight: Tensor) -> str:
    """What cut a weight in pieces, of which each process holds one; empty where it is whole.

    Args:
        weight: a parameter, or what a module has in its place.

    Example:
        >>> import torch
        >>> cut_by(torch.nn.Linear(2, 2).weight)
        ''
    """
    if is_part_of_a_flat_parameter(weight):
        return "a part of a flat parameter (as FullyShardedDataParallel makes it)"
    # Where the module was never imported, there is no such tensor, and importing it takes long.
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is not None and isinstance(weight, tensors.DTensor):
        return "a DTensor (as fully_shard and tensor parallelism make it)"
    return ""


WHOLE_WEIGHTS = "sparsity needs whole weights in each process: wrap the model in DistributedDataParallel"
"""What to do about a weight that is cut in pieces."""
