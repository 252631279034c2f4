"""Naive NumPy versions, written from the papers, agree with the library connection for connection over 50 updates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from rarefy.initializers import generator_for
from rarefy.ties import TieOrder

UPDATES, SHAPE = 50, (10, 14)


def largest(scores: np.ndarray, among: list[int], count: int, order: TieOrder) -> list[int]:
    """Indices of the `count` largest scores; the lower key wins a tie."""
    keys = order.keys(torch.arange(scores.size)).tolist()
    return sorted(among, key=lambda index: (-scores[index], keys[index]))[:count]


def naive_magnitude(weight: np.ndarray, sparsity: float, order: TieOrder) -> np.ndarray:
    mask = np.zeros(weight.size, bool)
    count = round((1 - sparsity) * weight.size)
    mask[largest(np.abs(weight).ravel(), list(range(weight.size)), count, order)] = True
    return mask.reshape(weight.shape)


def naive_drop_and_grow(weight, mask, sparsity, drop_fraction, grow_scores, order):
    magnitude, before = np.abs(weight).ravel(), np.flatnonzero(mask.ravel()).tolist()
    target = round((1 - sparsity) * weight.size)
    stay = min(len(before) - round(drop_fraction * len(before)), target)
    kept = largest(magnitude, before, stay, order)
    others = [index for index in range(weight.size) if index not in set(kept)]
    new = np.zeros(weight.size, bool)
    new[kept + largest(grow_scores.ravel(), others, target - stay, order.other())] = True
    return new.reshape(weight.shape)


def expected_mask(name, algorithm, weight, mask, dense_grad, update):
    sparsity, order = (
        algorithm.sparsity(algorithm.step, update),
        TieOrder.of(generator_for(3, "weight", update)),
    )
    if name == "static":
        return mask
    if name == "gmp":
        return naive_magnitude(weight, sparsity, order)
    grow = np.abs(dense_grad)
    if name == "set":
        grow = torch.rand(SHAPE, generator=generator_for(3, "weight", update)).numpy()
    fraction = algorithm.drop_fraction(algorithm.step, update)
    return naive_drop_and_grow(weight, mask, sparsity, fraction, grow, order)


@pytest.mark.parametrize("name", ["static", "gmp", "set", "rigl"])
@pytest.mark.parametrize("sparsity", [0.9, [0.5, 0.8, 0.65]], ids=["constant", "cycling"])
def test_every_update_agrees_with_the_naive_version(name, sparsity):
    if name == "static":
        sparsity = 0.9
    if name == "gmp" and sparsity == 0.9:
        sparsity = {"type": "polynomial", "init": 0.1, "final": 0.9, "start": 0, "stop": 40}
    options = (
        {"drop_fraction": {"type": "cosine", "init": 0.4, "half_period": 60}}
        if name in ("set", "rigl")
        else {}
    )
    update = {} if name == "static" else {"update": {"freq": 1}}
    torch.manual_seed(0)
    layer = nn.Linear(SHAPE[1], SHAPE[0], bias=False)
    algorithm = rarefy.configure({"algorithm": name, "sparsity": sparsity, "seed": 3, **options, **update})
    algorithm.apply(layer)
    algorithm.autoupdate = False  # it is updated by hand, and follows no optimizer
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        inputs = torch.randn(4, SHAPE[1])
        outputs = layer(inputs)
        (outputs - 1).square().sum().backward()
        dense_grad = (2 * (outputs - 1)).T @ inputs
        mask = layer.weight_mask.numpy().copy()
        optimizer.step()
        weight = layer.weight.detach().numpy().copy()
        algorithm.step += 1
        expected = expected_mask(
            name, algorithm, weight, mask, dense_grad.detach().numpy(), algorithm.updates
        )
        update_by_hand(algorithm, dense_grad)
        assert np.array_equal(layer.weight_mask.numpy(), expected)


def update_by_hand(algorithm, dense_grad):
    """Runs an update without the optimizer's hook, so that the weights before it could be read."""
    algorithm.parameters["weight"].dense_gradient.value = dense_grad.detach().clone()
    algorithm.update()
