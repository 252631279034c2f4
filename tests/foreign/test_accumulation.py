"""Growth by the gradient of the step that is taken, whatever is done to it between micro-batches and around steps.

Beside each model runs a dense one whose gradients stay whole until the optimizer steps.
"""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy

STORAGES = pytest.mark.parametrize("storage", ["masked", "compact"])
RIGL = {"algorithm": "rigl", "sparsity": 0.6, "update": {"freq": 2}, "drop_fraction": 0.4, "seed": 0}


class Pair:
    """A sparse layer and a dense one that is masked by hand, which take the same."""

    def __init__(self, storage):
        torch.manual_seed(0)
        layer = nn.Linear(10, 12).double()
        self.layers = layer, copy.deepcopy(layer)
        self.sparsity = rarefy.configure({**RIGL, "compute": storage})
        self.sparsity.apply(layer)
        self.optimizers = [torch.optim.SGD(one.parameters(), lr=0.1) for one in self.layers]
        self.sparsity.apply(self.optimizers[0])
        self.mask = self.found
        self.layers[1].weight.data.mul_(self.mask)

    @property
    def found(self):
        return self.sparsity.parameters["weight"].mask.clone()

    def backward(self, number):
        for layer in self.layers:
            x = torch.randn(7, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
            (layer(x) - x[:, :1].sin()).square().mean().backward()

    def change(self, change):
        for layer in self.layers:
            change(layer)

    def step(self):
        """One step of both, and what RigL makes of the dense gradient at the second one."""
        self.optimizers[0].step()
        weight = self.layers[1].weight
        self.gradient = weight.grad.clone()
        weight.grad.mul_(self.mask)
        self.optimizers[1].step()

    def check_update(self):
        """The mask is that of RigL by the whole gradient."""
        weight = self.layers[1].weight.data
        active = int(self.mask.sum())
        kept = torch.zeros(self.mask.numel(), dtype=torch.bool)
        kept[
            weight.abs().masked_fill(~self.mask, -1).flatten().topk(active - round(0.4 * active)).indices
        ] = True
        scores = self.gradient.abs().flatten().masked_fill(kept, -1)
        grown = scores.topk(active - int(kept.sum())).indices
        kept[grown] = True
        assert torch.equal(self.found.flatten(), kept)
        assert not torch.equal(self.found, self.mask)

    def zero(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def first_step(self):
        self.backward(0)
        self.step()
        self.zero()


def times(layer):
    layer.weight.grad.mul_(0.25)


def times_as_data(layer):
    layer.weight.grad.data.mul_(0.25)


def another_tensor(layer):
    layer.weight.grad = layer.weight.grad * 0.25


def by_foreach(layer):
    torch._foreach_mul_([layer.weight.grad], 0.25)


def turned_round(layer):
    layer.weight.grad.neg_()


def zeroed_as_data(layer):
    layer.weight.grad.data.zero_()


def zeroed_in_place(layer):
    layer.zero_grad(set_to_none=False)


def zeros_in_its_place(layer):
    layer.weight.grad = torch.zeros_like(layer.weight)


@STORAGES
@pytest.mark.parametrize(
    "change",
    [
        times,
        times_as_data,
        another_tensor,
        by_foreach,
        turned_round,
        zeroed_as_data,
        zeroed_in_place,
        zeros_in_its_place,
    ],
)
def test_what_is_done_between_micro_batches_is_done_to_every_position(storage, change):
    pair = Pair(storage)
    pair.first_step()
    pair.backward(1)
    pair.change(change)
    pair.backward(2)
    pair.step()
    pair.check_update()


@STORAGES
def test_a_step_that_raised_an_error_leaves_its_gradient_to_nobody(storage):
    pair = Pair(storage)
    pair.first_step()
    pair.backward(1)
    handle = pair.optimizers[0].register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pair.optimizers[0].step()
    handle.remove()
    pair.zero()
    pair.backward(2)
    pair.step()
    pair.check_update()


@STORAGES
def test_a_step_that_raised_an_error_is_taken_once_more(storage):
    pair = Pair(storage)
    pair.first_step()
    pair.backward(1)
    handle = pair.optimizers[0].register_step_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pair.optimizers[0].step()
    handle.remove()
    pair.step()
    pair.check_update()


def interrupt(*_):
    raise KeyboardInterrupt


@STORAGES
def test_a_gradient_that_no_step_has_used_grows_nothing(storage):
    """As after a step that a gradient scaler skipped."""
    pair = Pair(storage)
    pair.first_step()
    pair.backward(1)
    pair.zero()
    with pytest.warns(UserWarning, match="keeps its topology"):
        pair.optimizers[0].step()
    assert torch.equal(pair.found, pair.mask)


@STORAGES
def test_a_gradient_that_was_not_zeroed_after_the_last_step_counts(storage):
    pair = Pair(storage)
    pair.backward(0)
    pair.step()
    pair.backward(1)
    pair.step()
    pair.check_update()


@STORAGES
def test_a_gradient_that_was_zeroed_before_the_step_is_zero_at_every_position(storage):
    """The update finds ties alone: what was zeroed decides nothing."""
    masks = []
    for number in (1, 2):
        pair = Pair(storage)
        pair.first_step()
        pair.backward(number)
        pair.change(zeroed_as_data)
        pair.step()
        masks.append(pair.found)
    assert torch.equal(*masks)


# ---- what algorithms add up by themselves ----


class TwoLooks(torch.optim.SGD):
    """Asks for the gradient twice, and takes the second, as a line search does."""

    @torch.no_grad()
    def step(self, closure=None):
        for _ in range(2):
            with torch.enable_grad():
                closure()
        return super().step()


def observed(storage: str, way: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and the sums of `movement` after two steps."""
    torch.manual_seed(0)
    model = nn.Linear(12, 8, bias=False).double()
    sparsity = rarefy.configure(
        {
            "algorithm": "movement",
            "sparsity": [0.5, 0.6],
            "update": {"freq": 9},
            "compute": storage,
            "seed": 0,
        }
    )
    sparsity.apply(model)
    kind = TwoLooks if way == "two closures" else torch.optim.SGD
    optimizer = kind(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)

    def closure():
        optimizer.zero_grad()
        (model(torch.eye(12, dtype=torch.float64)) - 1).square().sum().backward()

    for _ in range(2):
        closure()
        if way == "fails":
            handle = optimizer.register_step_pre_hook(interrupt)
            with pytest.raises(KeyboardInterrupt):
                optimizer.step()
            handle.remove()
        optimizer.step(closure if way == "two closures" else None)
    parameter = sparsity.parameters["weight"]
    return parameter.dense_weight(), parameter.dense_state()["movement"]


@pytest.mark.parametrize("storage", ["masked", "compact"])
@pytest.mark.parametrize("way", ["fails", "two closures"])
def test_what_is_added_up_before_a_step_counts_once_for_each_that_was_taken(way, storage):
    for found, expected in zip(observed(storage, way), observed(storage, "plain"), strict=True):
        torch.testing.assert_close(found, expected)
        assert bool(expected.any())
