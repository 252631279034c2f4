"""The private names of torch for several processes: each test fails when torch renames one or changes what it means."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from rarefy.torch_private.ddp import (
    LEFT_OUT,
    backward_number,
    ddp_in_forward,
    outside_of_graphs,
    tolerates_uneven_inputs,
    when_backward_ends,
)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Asks(nn.Linear):
    """Remembers who wrapped it, call by call."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.wrappers: list[DistributedDataParallel | None] = []

    def forward(self, input: Tensor) -> Tensor:
        self.wrappers.append(ddp_in_forward())
        return super().forward(input)


def test_a_wrapper_leaves_the_names_alone_that_its_module_tells(alone: None) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    setattr(model, LEFT_OUT, iter(["0.weight", "1.running_mean"]))
    network = DistributedDataParallel(model)
    assert network.parameters_to_ignore == {"0.weight", "1.running_mean"}
    assert network.require_backward_grad_sync
    with network.no_sync():
        assert not network.require_backward_grad_sync


def test_the_names_of_the_wrapped_module_itself_have_a_dot_for_the_reducer(alone: None) -> None:
    model = nn.Linear(2, 2)
    setattr(model, LEFT_OUT, ["weight", ".weight"])
    network = DistributedDataParallel(model)
    network(torch.ones(1, 2)).sum().backward()
    # Else the reducer waits for the gradient of a weight that was frozen behind its back.
    model.weight.requires_grad_(False)
    network(torch.ones(1, 2)).sum().backward()
    network(torch.ones(1, 2)).sum().backward()


def test_a_module_knows_in_whose_forward_pass_it_is(alone: None) -> None:
    model = Asks()
    network = DistributedDataParallel(model)
    network(torch.ones(1, 2))
    model(torch.ones(1, 2))
    assert model.wrappers[0] is network and model.wrappers[1:] == [None]


def test_a_wrapper_tells_whether_inputs_may_be_uneven(alone: None) -> None:
    network = DistributedDataParallel(nn.Linear(2, 2))
    assert not tolerates_uneven_inputs(network)
    with network.join():
        assert tolerates_uneven_inputs(network)


def test_what_is_asked_for_in_a_backward_pass_comes_at_its_end() -> None:
    heard = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda _: when_backward_ends(lambda: heard.append("end")))
    x.register_hook(lambda _: heard.append("leaf"))
    y.sum().backward()
    assert heard == ["leaf", "end"]


def test_every_backward_pass_has_a_number() -> None:
    numbers = []
    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda _: numbers.append(backward_number()))
    for _ in range(2):
        (x * 2).sum().backward()

    def inside(x: Tensor) -> Tensor:
        y = x * 2
        if y.requires_grad:
            y.register_hook(lambda _: numbers.append(backward_number()))
        return y

    # That of a checkpoint runs inside of another one.
    outer = checkpoint(inside, x, use_reentrant=True)
    assert isinstance(outer, Tensor)
    outer.sum().backward()
    assert len(numbers) == len(set(numbers)) == 4 and min(numbers) >= 0
    assert backward_number() == -1


def test_a_function_is_called_between_two_graphs() -> None:
    traced = []

    @outside_of_graphs
    def outside() -> None:
        traced.append(torch.compiler.is_compiling())

    def function(x: Tensor) -> Tensor:
        outside()
        return x + 1

    compiled = torch.compile(function, backend="eager")
    assert [compiled(torch.ones(1)).item() for _ in range(2)] == [2, 2]
    assert traced == [False, False]
