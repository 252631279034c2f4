"""`distribution: global`: the connections of all weights compete, and each weight keeps what it wins."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rarefy
from helpers import assert_exact_zeros, assert_identical, same, snapshot
from rarefy.errors import ConfigError, RarefyError

RISING = {"type": "polynomial", "init": 0.0, "final": 0.9, "start": 0, "stop": 80}
BLOCK = {"algorithm": "gmp", "sparsity": RISING, "update": {"freq": 2}, "distribution": "global", "seed": 3}


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 8), nn.Tanh(), nn.Linear(8, 8)).double()
    with torch.no_grad():
        model[2].weight.mul_(1.5)
    return model


def prepare(model: nn.Module, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    sparsity = rarefy.configure({**BLOCK, **changes})
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.5)
    sparsity.apply(optimizer)
    return sparsity, optimizer


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    x = torch.randn(10, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    optimizer.zero_grad()
    (model(x) - x[:, :8]).square().mean().backward()
    optimizer.step()


def units(weight: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    rows, columns = block
    return abs(weight).reshape(weight.shape[0] // rows, rows, -1, columns).sum((1, 3)).ravel()


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("block", [(1, 1), (2, 2)])
def test_fifty_updates_are_those_of_one_sorted_list(compute, block):
    model = layers()
    pattern = {} if block == (1, 1) else {"pattern": {"block": list(block)}}
    sparsity, optimizer = prepare(model, compute=compute, **pattern)
    [algorithm] = sparsity.algorithms
    algorithm.autoupdate = False
    shares = set()
    for step in range(1, 51):
        learn(model, optimizer, step)
        algorithm.step = 2 * step
        before = {name: one.dense_weight().numpy().copy() for name, one in algorithm.parameters.items()}
        algorithm.update()
        scores = [units(weight, block) for weight in before.values()]
        ranked = np.concatenate(scores)
        target = 0.9 - 0.9 * (1 - min(2 * step, 80) / 80) ** 3
        lowest = np.sort(ranked)[::-1][round((1 - target) * ranked.size) - 1]
        for score, parameter in zip(scores, algorithm.parameters.values(), strict=True):
            kept = units(parameter.mask.numpy().astype(float), block) > 0
            assert np.array_equal(kept, score >= lowest)
        shares.add(tuple(row.target for row in rarefy.summary(sparsity).rows))
    assert len({round(share, 3) for share in shares.pop()}) == 3
    # The middle layer began with larger weights.
    first, middle, _ = (row.actual for row in rarefy.summary(sparsity).rows)
    assert first > 0.9 > middle


@pytest.mark.parametrize("method", ["gmp", "movement", "ac_dc"])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_resume_is_bit_identical(method, compute):
    own = {"sparsity": 0.7, "update": {"freq": 2, "stop": 15}} if method == "ac_dc" else {}
    options = {"algorithm": method, "compute": compute, "init_method": "topk", **own}
    model = layers()
    sparsity, optimizer = prepare(model, **options)
    for step in range(9):
        if step == 5:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsity.state_dict()))
        learn(model, optimizer, step)
    resumed = layers(seed=9)
    again, other = prepare(resumed, **{**options, "seed": 5})
    for target, state in zip((resumed, other, again), saved, strict=True):
        target.load_state_dict(state)
    for step in range(5, 9):
        learn(resumed, other, step)
    assert_identical(snapshot(model, optimizer), snapshot(resumed, other))
    assert_exact_zeros(sparsity, optimizer)
    assert same(sparsity.state_dict(), again.state_dict())
    assert str(rarefy.summary(sparsity)) == str(rarefy.summary(again))


def test_a_first_mask_by_size_competes_too_and_one_at_random_is_shared_out_evenly():
    for init_method, expected in (("topk", 3), ("random", 1)):
        model = layers()
        sparsity, _ = prepare(model, sparsity=[0.75, 0.8], init_method=init_method)
        rows = rarefy.summary(sparsity).rows
        assert len({round(row.actual, 3) for row in rows}) == expected
        assert sum(row.kept for row in rows) == round(0.25 * (16 * 24 + 24 * 8 + 64))


def test_hooks_hear_what_each_weight_has_won():
    heard: dict[str, float] = {}
    model = layers()
    sparsity = rarefy.configure({**BLOCK, "sparsity": [0.5, 0.8], "init_method": "topk"})
    sparsity.register_target_sparsity_hook(lambda _, name, value: heard.update({name: value}))
    sparsity.apply(model)
    sparsity.update()
    assert heard == {row.name: pytest.approx(row.actual) for row in rarefy.summary(sparsity).rows}


def test_a_frozen_weight_keeps_what_it_has():
    model = layers()
    _, optimizer = prepare(model, sparsity=[0.5, 0.9], init_method="topk")
    model[2].weight.requires_grad_(False)
    before = model[2].weight_mask.clone()
    for step in range(2):
        learn(model, optimizer, step)
    assert torch.equal(model[2].weight_mask, before)
    kept = int(model[0].weight_mask.sum()) + int(model[4].weight_mask.sum())
    assert kept == round(0.1 * (16 * 24 + 64))


def test_balanced_groups_share_what_their_weight_has_won():
    model = layers()
    sparsity, optimizer = prepare(model, sparsity=[0.5, 0.8], balance_out_groups=4, init_method="topk")
    for step in range(4):
        learn(model, optimizer, step)
    for parameter in sparsity.algorithms[0].parameters.values():
        assert len({int(group.sum()) for group in parameter.mask.chunk(4)}) == 1


def test_a_weight_that_would_lose_everything_is_named():
    model = layers()
    with torch.no_grad():
        model[4].weight.mul_(1e-6)
    sparsity, _ = prepare(model, sparsity=[0.0, 0.9])
    with pytest.raises(RarefyError) as caught:
        sparsity.update()
    assert str(caught.value) == (
        "distribution: global at sparsity 0.9 leaves no connection in 4.weight; give distribution: uniform, a lower "
        "sparsity, or a param_filter without them"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"algorithm": "rigl", "sparsity": 0.5},
            "sparsity.distribution: global is not allowed; give uniform, er or erk for rigl; connections of all "
            "weights compete under gmp and its kin (example: distribution: erk)",
        ),
        (
            {"pattern": "fan_in"},
            "sparsity.distribution: global with the pattern fan_in is not allowed; give uniform, er or erk, as each "
            "side of every weight keeps as many",
        ),
        (
            {"sparsity": [0.0, 0.5], "pattern": {"n": 2, "m": 4}},
            "sparsity.distribution: global with the pattern {n: 2, m: 4} is not allowed; give uniform, as every weight "
            "keeps n of m",
        ),
    ],
)
def test_what_cannot_compete_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        rarefy.configure({**BLOCK, **changes})
    assert str(caught.value) == message


def test_a_class_that_competes_needs_a_score():
    class Scoreless(rarefy.DynamicSparsityAlgorithm):
        competes = True

        def update_mask(self, view):
            return self.keep_top(view.weight.abs(), view.sparsity)

    algorithm = Scoreless(0.5, distribution="global")
    algorithm.apply(layers())
    with pytest.raises(NotImplementedError):
        algorithm.update()
