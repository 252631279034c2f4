"""Which of several processes this is, joining the others, and what all must agree on; alone, it exchanges nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.distributed.means import Traffic
from rarefy.errors import RarefyError

T = TypeVar("T")


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


def is_first() -> bool:
    """Whether this process writes logs and checkpoints; torchrun's processes know it before they have joined.

    Example:
        >>> is_first()
        True
    """
    return place()[0] == 0


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
        # What is kept on the CPU beside a GPU (`cpu_offload`) is exchanged too, and NCCL sends nothing from there.
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store = _store_of_restart()
        if store is None:
            dist.init_process_group(backend)
        else:
            rank, count = place()
            dist.init_process_group(backend, store=store, rank=rank, world_size=count)
    return device


def _store_of_restart() -> dist.Store | None:
    """Where processes that torchrun has restarted find one another; None for those that it started first."""
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if restarts == "0" or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    # torchrun's store outlives the processes (unless --rdzv-backend says otherwise), and still has their addresses.
    port = int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(os.environ["MASTER_ADDR"], port, place()[1], is_master=False)
    return dist.PrefixStore(f"rarefy/restart_{restarts}", store)


_ENDED = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited", "Socket closed")


def lost_another(error: Exception) -> bool:
    """Whether an error of torch only tells that another process has ended, which says itself why.

    Example:
        >>> lost_another(RuntimeError("Connection closed by peer [127.0.0.1]:29500"))
        False
    """
    # torch has one kind of error for each of its backends, and none for this.
    is_torch = isinstance(error, RuntimeError) and place()[1] > 1
    return is_torch and any(words in str(error) for words in _ENDED)


def wait_for_all() -> None:
    """Returns when every process has come here."""
    if ranks() > 1:
        dist.barrier()


def sending_device(device: torch.device, group: Any = None) -> torch.device:
    """Where a tensor is exchanged from: where it is, if the process group can send from there; else where it can.

    Args:
        device: where the tensor is.
        group: of processes; None for all.
    """
    # Such as "cpu:gloo,cuda:nccl"; that of a plain NCCL group has no "cpu".
    kinds = [pair.partition(":")[0] for pair in dist.get_backend_config(group).split(",")]
    return device if device.type in kinds else torch.device(kinds[0])


def mean_over_ranks(tensor: Tensor, traffic: Traffic | None = None) -> Tensor:
    """The mean of `tensor` over all ranks, in place.

    Args:
        tensor: floating point, of the same shape in every process.
        traffic: what is exchanged is added to it.

    Example:
        >>> import torch
        >>> mean_over_ranks(torch.ones(2))
        tensor([1., 1.])
    """
    if ranks() > 1:
        # Summed and divided: gloo has no mean.
        counted = traffic or Traffic()
        sent = tensor.to(sending_device(tensor.device))
        counted.gave(sent)
        start = time.perf_counter()
        dist.all_reduce(sent)
        counted.waited(start)
        torch.div(sent.to(tensor.device), ranks(), out=tensor)
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


def of_first(numbers: Sequence[int], device: torch.device) -> list[int]:
    """The numbers that the first process brings; all bring as many.

    Args:
        numbers: whole numbers below 2^63.
        device: where they matter.

    Example:
        >>> of_first([3, 1], torch.device("cpu"))
        [3, 1]
    """
    if ranks() == 1 or not numbers:
        return list(numbers)
    box = torch.tensor(numbers, device=sending_device(device))
    dist.broadcast(box, 0)
    return box.tolist()


def highest_of_all(number: int) -> int:
    """The highest of the numbers that all processes bring.

    Example:
        >>> highest_of_all(3)
        3
    """
    return max(from_all(number))


def from_all(value: T) -> list[T]:
    """What each process brings, by rank; something small that pickle knows.

    Example:
        >>> from_all("here")
        ['here']
    """
    if ranks() == 1:
        return [value]
    box = [value] * ranks()
    dist.all_gather_object(box, value)
    return box


def differing(numbers: Mapping[str, int], device: torch.device, group: Any = None) -> list[str]:
    """The names whose number is not the same in all processes; each brings the same names.

    Args:
        numbers: whole numbers below 2^63 by name.
        device: where they matter.
        group: of processes; None for all.

    Example:
        >>> differing({"fc.weight": 3}, torch.device("cpu"))
        []
    """
    if ranks() == 1 or not numbers:
        return []
    own = torch.tensor(list(numbers.values()), device=sending_device(device, group))
    # One exchange for both bounds: the highest of −x is minus the lowest of x.
    bounds = torch.stack([own, -own])
    dist.all_reduce(bounds, dist.ReduceOp.MAX, group=group)
    differs = bounds[0] != -bounds[1]
    return [name for name, found in zip(numbers, differs.tolist(), strict=True) if found]


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Ends in all processes with an error where it does so in some; nothing inside may wait for another process.

    A process that fails raises what it raised; the others would wait for it in their next exchange, and say instead
    which one it was, and why.

    Args:
        device: where the model is.

    Raises:
        RarefyError: another process failed.

    Example:
        >>> with failing_together(torch.device("cpu")):
        ...     int("3")
        3
    """
    if ranks() == 1:
        yield
        return
    try:
        yield
    except Exception as error:
        _any_failed(True, device)
        # Never empty, which is how the others say that nothing is wrong.
        from_all(str(error) or type(error).__name__)
        raise
    if _any_failed(False, device):
        problems = from_all("")
        first = next(rank for rank, problem in enumerate(problems) if problem)
        raise RarefyError(f"process {first} of {len(problems)} failed: {problems[first]}")


def _any_failed(failed: bool, device: torch.device) -> bool:
    # One number, as this is asked in every step; what was said is exchanged where there is something.
    box = torch.tensor(int(failed), device=sending_device(device))
    dist.all_reduce(box, dist.ReduceOp.MAX)
    return bool(box)
