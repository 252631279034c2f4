"""What an algorithm knows of its optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn, optim

from rarefy.storage.optimizer_traits import preserves_zeros, trained_parameters

MAKERS = {
    "SGD": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda p: optim.Adam(p, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: optim.AdamW(p, weight_decay=0.1),
    "AdamW, eps 0": lambda p: optim.AdamW(p, eps=0.0),
    "AdamW, maximize": lambda p: optim.AdamW(p, maximize=True),
    "NAdam": lambda p: optim.NAdam(p, weight_decay=0.1),
    "RAdam": lambda p: optim.RAdam(p, weight_decay=0.1),
    "RMSprop": lambda p: optim.RMSprop(p, centered=True, momentum=0.9),
    "Adagrad": lambda p: optim.Adagrad(p, initial_accumulator_value=0.0),
    "Adadelta": lambda p: optim.Adadelta(p, weight_decay=0.1),
    "Adamax": lambda p: optim.Adamax(p),
    "ASGD": lambda p: optim.ASGD(p),
    "Rprop": lambda p: optim.Rprop(p),
    "Adafactor": lambda p: optim.Adafactor(p),
}


@pytest.mark.parametrize("name", MAKERS)
def test_an_optimizer_said_to_preserve_zeros_really_does(name):
    torch.manual_seed(0)
    weight, mask = nn.Parameter(torch.randn(6, 6)), torch.rand(6, 6) < 0.5
    weight.data.masked_fill_(~mask, 0)
    optimizer = MAKERS[name]([weight])
    for _ in range(5):
        weight.grad = torch.randn(6, 6).masked_fill(~mask, 0)
        optimizer.step()
    tensors = [weight, *(v for v in optimizer.state[weight].values() if v.shape == weight.shape)]
    kept = all(not tensor[~mask].any() for tensor in tensors)
    assert kept or not preserves_zeros(optimizer)


def test_the_common_ones_need_no_help():
    weight = [nn.Parameter(torch.ones(2, 2))]
    assert all(preserves_zeros(MAKERS[name](weight)) for name in ("SGD", "Adam", "AdamW", "RMSprop"))


def test_subclasses_and_zero_eps_are_not_trusted():
    class Mine(optim.SGD):
        pass

    weight = [nn.Parameter(torch.ones(2, 2))]
    assert not preserves_zeros(Mine(weight, lr=0.1))
    assert not preserves_zeros(
        optim.AdamW([{"params": weight}, {"params": [nn.Parameter(torch.ones(1))], "eps": 0.0}])
    )


def test_trained_parameters_are_those_of_all_groups_in_order():
    first, second, third = (nn.Parameter(torch.ones(1)) for _ in range(3))
    optimizer = optim.SGD([{"params": [second]}, {"params": [first]}], lr=0.1)
    found = trained_parameters(optimizer)
    assert [id(parameter) for parameter in found] == [id(second), id(first)]
    assert third not in found
