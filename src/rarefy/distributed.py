"""Training in several processes: what they must agree on; without a process group these are no-ops."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.torch_private import is_part_of_a_flat_parameter


def ranks() -> int:
    """How many processes train together.

    Example:
        >>> ranks()
        1
    """
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def place() -> tuple[int, int]:
    """The rank of this process and how many there are; torchrun's processes know it before they have joined.

    Example:
        >>> place()
        (0, 1)
    """
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    # Job schedulers set WORLD_SIZE too; only together with RANK does it mean processes that train one model.
    if "RANK" not in os.environ:
        return 0, 1
    return int(os.environ["RANK"]), int(os.environ.get("WORLD_SIZE", "1"))


def mean_over_ranks(tensor: Tensor) -> Tensor:
    """The mean of `tensor` over all ranks, in place.

    Example:
        >>> import torch
        >>> mean_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if ranks() > 1:
        # Summed and divided: gloo has no mean.
        dist.all_reduce(tensor)
        tensor /= ranks()
    return tensor


def agreed_seed(seed: int) -> int:
    """The seed of rank 0, so that every rank draws the same masks.

    Example:
        >>> agreed_seed(7)
        7
    """
    if ranks() == 1:
        return seed
    # As an object: torch's seeds have up to 64 bits without a sign, which no int64 tensor holds.
    box: list[int] = [seed]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def join_processes(device: torch.device) -> torch.device:
    """Joins the other processes, if torchrun started this one.

    Args:
        device: where the model is to be.

    Returns:
        The device of this process: its own GPU where there are several.
    """
    if "RANK" not in os.environ or not dist.is_available():
        return device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        # Else NCCL and every `cuda` without a number would mean GPU 0 in all processes.
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device


def is_first() -> bool:
    """Whether this process writes logs and checkpoints; torchrun's processes know it before they have joined.

    Example:
        >>> is_first()
        True
    """
    return place()[0] == 0


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if ranks() > 1:
        dist.barrier()


def highest_of_all(number: int) -> int:
    """The highest of the numbers that all processes bring.

    Example:
        >>> highest_of_all(3)
        3
    """
    if ranks() == 1:
        return number
    box: list[int] = [0] * ranks()
    dist.all_gather_object(box, number)
    return max(box)


def differing(numbers: Mapping[str, int], device: torch.device) -> list[str]:
    """The names whose number is not the same in all processes; each brings the same names.

    Args:
        numbers: whole numbers below 2^63 by name.
        device: one that the process group can send from.

    Example:
        >>> differing({"fc.weight": 3}, torch.device("cpu"))
        []
    """
    if ranks() == 1 or not numbers:
        return []
    own = torch.tensor(list(numbers.values()), device=device)
    # One exchange for both bounds: the highest of −x is minus the lowest of x.
    bounds = torch.stack([own, -own])
    dist.all_reduce(bounds, dist.ReduceOp.MAX)
    differs = bounds[0] != -bounds[1]
    return [name for name, found in zip(numbers, differs.tolist(), strict=True) if found]


def wrapped(model: nn.Module) -> nn.Module:
    """The module whose forward and backward pass average the gradients over all processes."""
    return model if ranks() == 1 else DistributedDataParallel(model)


def cut_by(weight: Tensor) -> str:
    """What cut a weight in pieces, of which each process holds one; empty where it is whole.

    Args:
        weight: a parameter, or what a module has in its place.

    Example:
        >>> cut_by(nn.Linear(2, 2).weight)
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
