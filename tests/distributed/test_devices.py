"""What is exchanged lies where the process group can send from: NCCL takes nothing from the CPU.

Tensors without content stand for those of a GPU; a group that sends them is told by its name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from rarefy.distributed import (
    Cut,
    Traffic,
    agreement,
    differing,
    failing_together,
    join_processes,
    mean_over_ranks,
    means_over_ranks,
    of_first,
)
from rarefy.distributed.agreement import sending_device

GPU = torch.device("meta")
CPU = torch.device("cpu")


class ExchangedError(Exception):
    """A tensor was handed to torch."""


class Mesh:
    """Two processes of such a GPU."""

    device_type = "meta"

    def get_group(self, dimension: int) -> None:
        return None

    def size(self, dimension: int) -> int:
        return 2

    def get_local_rank(self, dimension: int) -> int:
        return 0


class Shard:
    dim = 0


@pytest.fixture
def sends(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """The devices of tensors that are exchanged from now on, by two processes of a group of some backends."""
    seen: list[str] = []

    def exchange(tensor: Tensor, *_: Any, **__: Any) -> None:
        seen.append(tensor.device.type)
        raise ExchangedError

    def group_of(backends: str) -> list[str]:
        monkeypatch.setattr(dist, "get_backend_config", lambda group=None: backends)
        return seen

    for name in ("all_reduce", "broadcast"):
        monkeypatch.setattr(dist, name, exchange)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(agreement, "ranks", lambda: 2)
    return group_of


def fails_together(device: torch.device) -> None:
    with failing_together(device):
        pass


EXCHANGES: dict[str, Callable[[torch.device], Any]] = {
    "mean": lambda device: mean_over_ranks(torch.ones(2, device=device)),
    "differing": lambda device: differing({"w": 1}, device),
    "of first": lambda device: of_first([1], device),
    "failing": fails_together,
}


@pytest.mark.parametrize("name", EXCHANGES)
@pytest.mark.parametrize(
    ("backends", "device", "expected"),
    [
        ("meta:nccl", GPU, "meta"),
        ("meta:nccl", CPU, "meta"),
        ("cpu:gloo,meta:nccl", GPU, "meta"),
        ("cpu:gloo,meta:nccl", CPU, "cpu"),
        ("cpu:gloo", GPU, "cpu"),
    ],
)
def test_it_is_sent_from_where_the_group_can(
    sends: Callable[[str], list[str]], name: str, backends: str, device: torch.device, expected: str
) -> None:
    seen = sends(backends)
    # The content of the tensors that stand for a GPU's cannot be brought to the CPU.
    error = NotImplementedError if (name, backends) == ("mean", "cpu:gloo") else ExchangedError
    with pytest.raises(error):
        EXCHANGES[name](device)
    assert seen == [expected] * (error is ExchangedError)


def test_gradients_are_averaged_where_they_are(sends: Callable[[str], list[str]]) -> None:
    seen = sends("meta:nccl")
    with pytest.raises(ExchangedError):
        means_over_ranks([torch.ones(2, device=GPU)], [True], None, Traffic())
    assert seen == ["meta"]


@pytest.mark.parametrize("numbers", ["on the CPU", "there"])
def test_counts_of_pieces_are_summed_where_the_mesh_is(
    sends: Callable[[str], list[str]], numbers: str
) -> None:
    seen = sends("meta:nccl")
    cut = Cut(torch.Size([4]), (1,), Mesh(), (Shard(),), CPU if numbers == "on the CPU" else GPU)
    with pytest.raises(ExchangedError):
        cut.gathered(3)
    assert seen == ["meta"]


def test_processes_with_gpus_join_a_group_that_sends_from_the_cpu_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    backends: list[Any] = []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: backends.append(device.index))
    monkeypatch.setattr(dist, "init_process_group", backends.append)
    assert join_processes(torch.device("cuda")) == torch.device("cuda", 1)
    assert backends == [1, "cpu:gloo,cuda:nccl"]


def test_a_single_device_is_the_groups_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
    assert sending_device(CPU) == torch.device("cuda")
    assert sending_device(torch.device("cuda", 3)) == torch.device("cuda", 3)
