"""`keep_rows`: no output loses its last connection, and one without any is the first that grows."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rarefy
from helpers import assert_identical, snapshot
from rarefy.errors import ConfigError, RarefyError
from rarefy.masks import drop_in_rows, kept_count
from rarefy.ties import TieOrder

ORDER = TieOrder.of(torch.Generator())
METHODS = ["set", "rigl", "mest", "granet"]
RISING_LESS = {"type": "polynomial", "init": 0.5, "final": 0.8, "start": 0, "stop": 20}
RISING = {"type": "polynomial", "init": 0.5, "final": 0.9, "start": 0, "stop": 20}


def prepare(name: str, model: nn.Module, **changes: Any) -> tuple[Any, torch.optim.Optimizer]:
    block = {
        "algorithm": name,
        "sparsity": RISING if name == "granet" else 0.9,
        "update": {"freq": 1},
        "seed": 2,
    }
    sparsity = rarefy.configure({**block, "keep_rows": True, "drop_fraction": 0.5, **changes})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    sparsity.apply(optimizer)
    return sparsity, optimizer


def layers(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
    with torch.no_grad():
        # Rows that every update would empty, and that no gradient reaches.
        model[0].weight[:8] *= 1e-6
        model[0].bias[:8] = -99.0
    return model


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        (model(x) - x[:, :12]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize(
    "changes", [{}, {"pattern": {"block": [2, 2]}, "sparsity": 0.8}], ids=["single", "blocks"]
)
def test_every_output_keeps_a_connection(name, compute, changes):
    alive = {}
    for keep_rows in (True, False):
        model = layers()
        own = {**changes, "sparsity": RISING_LESS} if name == "granet" and changes else changes
        sparsity, optimizer = prepare(name, model, compute=compute, keep_rows=keep_rows, **own)
        learn(model, optimizer, range(25))
        rows = [parameter.mask.any(1) for parameter in sparsity.algorithms[0].parameters.values()]
        alive[keep_rows] = bool(torch.cat(rows).all())
        for parameter in sparsity.algorithms[0].parameters.values():
            assert int(parameter.mask.sum()) == parameter.pattern.kept(
                parameter.shape, sparsity.target_sparsity
            )
    assert alive == {True: True, False: False}


@pytest.mark.parametrize("name", METHODS)
def test_resume_is_bit_identical(name):
    model = layers()
    sparsity, optimizer = prepare(name, model)
    learn(model, optimizer, range(4))
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsity.state_dict()))
    learn(model, optimizer, range(4, 9))
    resumed = layers(seed=7)
    again, other = prepare(name, resumed)
    for target, state in zip((resumed, other, again), saved, strict=True):
        target.load_state_dict(state)
    learn(resumed, other, range(4, 9))
    assert_identical(snapshot(model, optimizer), snapshot(resumed, other))


def naive(
    mask: torch.Tensor, weight: torch.Tensor, grow: torch.Tensor, count: int, fraction: float
) -> torch.Tensor:
    """Lists of places: the strongest connection of each row is the first to stay, an empty row the first to grow."""
    rows, columns = mask.shape
    active = mask.flatten().nonzero().squeeze(1).tolist()
    size, wish = weight.abs().flatten().tolist(), grow.flatten().tolist()
    strongest = {max(mine, key=size.__getitem__) for mine in by_row(active, rows, columns) if mine}
    stay = min(len(active) - round(fraction * len(active)), count)
    # Those that are all ∞ to the ranking go by the order of ties, which is left to `masks` here.
    if len(strongest) >= stay:
        flat = torch.tensor([[torch.inf if place in strongest else s for place, s in enumerate(size)]])
        kept = (
            drop_in_rows(mask.view(1, -1), flat, count, fraction, ORDER)
            .flatten()
            .nonzero()
            .squeeze(1)
            .tolist()
        )
    else:
        rest = sorted(set(active) - strongest, key=size.__getitem__, reverse=True)
        kept = [*strongest, *rest[: stay - len(strongest)]]
    places = [[row * columns + column for column in range(columns)] for row in range(rows)]
    empty = [
        max(places[row], key=wish.__getitem__)
        for row, mine in enumerate(by_row(kept, rows, columns))
        if not mine
    ]
    others = sorted(set(range(mask.numel())) - {*kept, *empty}, key=wish.__getitem__, reverse=True)
    grown = [*empty, *others][: count - len(kept)]
    if len(empty) > count - len(kept):
        return torch.empty(0)
    found = torch.zeros(mask.numel(), dtype=torch.bool)
    found[torch.tensor([*kept, *grown], dtype=torch.long)] = True
    return found.view_as(mask)


def by_row(places: list[int], rows: int, columns: int) -> list[list[int]]:
    return [[place for place in places if place // columns == row] for row in range(rows)]


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    sparsity=st.floats(0, 0.95),
    fraction=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_an_update_agrees_with_a_loop_over_rows(rows, columns, sparsity, fraction, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, gradient = torch.randn(2, rows, columns, generator=generator)
    mask = torch.rand(rows, columns, generator=generator) < 0.3
    algorithm = rarefy.RigL(sparsity, drop_fraction=fraction, keep_rows=True)
    algorithm.generator = torch.Generator()
    view = rarefy.algorithms.view.WeightView.of(weight * mask, mask, sparsity, gradient)
    found = algorithm.update_mask(view)
    count = kept_count(mask.numel(), sparsity)
    if mask.all():
        assert int(found.sum()) == max(count, 1)
        return
    expected = naive(mask, weight * mask, gradient.abs(), count, fraction)
    # Where fewer may grow than outputs are empty, the order of ties chooses among them.
    assert int(found.sum()) == count and (not len(expected) or torch.equal(found, expected))
    active = int(mask.sum())
    stay = min(active - round(fraction * active), count)
    assert found.any(1).sum() == min(rows, min(stay, int(mask.any(1).sum())) + count - stay)


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_where_no_output_would_die_nothing_changes(name):
    states = []
    for keep_rows in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 12))
        _, optimizer = prepare(name, model, keep_rows=keep_rows, sparsity=0.3, drop_fraction=0.2)
        learn(model, optimizer, range(10))
        states.append(model.state_dict())
    assert_identical(*states)


def test_outputs_are_found_where_the_module_has_them():
    """A transposed convolution holds [in, out, …]."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose2d(8, 12, 2, bias=False)
    with torch.no_grad():
        layer.weight[:, :4] *= 1e-6
    sparsity = rarefy.SET(0.9, keep_rows=True, init_method="topk", drop_fraction=0.5, seed=0)
    sparsity.apply(layer)
    for _ in range(6):
        sparsity.update()
    assert layer.weight_mask.transpose(0, 1).flatten(1).any(1).all()


def test_nan_gradients_are_the_last_to_grow_a_row():
    mask = torch.tensor([[True, True, True], [False, False, False]])
    gradient = torch.tensor([[0.0, 0.0, 0.0], [float("nan"), 1.0, 2.0]])
    algorithm = rarefy.RigL(0.5, drop_fraction=0.34, keep_rows=True)
    view = rarefy.algorithms.view.WeightView.of(torch.ones(2, 3) * mask, mask, 0.5, gradient)
    assert algorithm.update_mask(view)[1].tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        (
            {"algorithm": "rigl", "sparsity": 0.5, "keep_rows": 1},
            "sparsity.keep_rows: 1 is not allowed; give true or false (example: keep_rows: true)",
        ),
        (
            {"algorithm": "srigl", "sparsity": 0.5, "keep_rows": True},
            "sparsity.keep_rows: true is not allowed; give false for srigl: outputs have a fan-in, or are ablated",
        ),
        (
            {"algorithm": "set", "sparsity": 0.5, "pattern": "diagonal", "keep_rows": True},
            "sparsity.keep_rows: true with the pattern diagonal is not allowed; give false: each diagonal has a "
            "connection of every feature of the weight's shorter side",
        ),
    ],
)
def test_refusals(block, message):
    with pytest.raises((ConfigError, RarefyError)) as caught:
        rarefy.configure(block)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "pattern", ["fan_in", "fan_out", {"n": 1, "m": 4}, {"n": 2, "m": 4, "transposable": True}], ids=str
)
@pytest.mark.parametrize("name", METHODS)
def test_every_pattern_goes_with_it(name, pattern):
    model = layers()
    rows = {"sparsity": 1 - pattern["n"] / pattern["m"]} if isinstance(pattern, dict) else {}
    if name == "granet":
        rows = {"sparsity": [0.0, *rows.values()]} if rows else {}
    sparsity, optimizer = prepare(name, model, pattern=pattern, drop_fraction=0.6, **rows)
    for step in range(9):
        learn(model, optimizer, range(step, step + 1))
        for parameter in sparsity.algorithms[0].parameters.values():
            assert parameter.pattern.structure.holds(parameter.mask, sparsity.target_sparsity)
            # Several empty outputs may want the same input, which has room for one.
            assert pattern == "fan_out" or parameter.mask.any(1).all()


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_equal_weights_of_an_output_are_told_apart_by_the_seed(compute: str) -> None:
    """With as many connections as outputs each keeps one, which is not the first for all of them."""
    chosen = []
    for seed in (1, 2):
        layer = nn.Linear(32, 32, bias=False)
        nn.init.ones_(layer.weight)
        block = {"algorithm": "set", "sparsity": 31 / 32, "update": {"steps": [1]}, "keep_rows": True}
        sparsity = rarefy.configure({**block, "compute": compute, "seed": seed})
        sparsity.apply(layer)
        sparsity.update()
        mask = layer.weight_mask.to_dense()
        assert mask.sum(1).tolist() == [1] * 32
        chosen.append(mask.int().argmax(1))
        # Of 32 drawn at random about 20 are different.
        assert len(chosen[-1].unique()) > 12
    assert not torch.equal(*chosen)
