"""Training in several processes that torchrun started: one model, gradients averaged, rank 0 writes."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from rarefy.collective import ranks


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
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if ranks() > 1:
        dist.barrier()


def highest(number: int) -> int:
    """The highest of the numbers that all processes bring.

    Example:
        >>> highest(3)
        3
    """
    if ranks() == 1:
        return number
    box: list[int] = [0] * ranks()
    dist.all_gather_object(box, number)
    return max(box)


def wrapped(model: nn.Module) -> nn.Module:
    """The module whose forward and backward pass average the gradients over all processes."""
    return model if ranks() == 1 else DistributedDataParallel(model)
