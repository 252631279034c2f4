"""Patterns and distributions under every algorithm: invariants after many updates, in both storages, and resume."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import rarefy
from contract_rows import ROWS, options_of, takes, takes_pattern
from helpers import (
    assert_exact_zeros,
    assert_identical,
    small_model,
    snapshot,
    sparse_parameters,
    train_step,
)
from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.distributions import share_out
from rarefy.errors import ConfigError, RarefyError
from rarefy.initializers import generator_for
from rarefy.masks import drop_lowest, grow_highest, keep_top, kept_count
from rarefy.methods.registry import ALGORITHMS

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)
PATTERNS = {
    "2 of 4": {"pattern": {"n": 2, "m": 4}},
    "1 of 2 in groups": {"pattern": {"n": 1, "m": 2}, "balance_in_groups": 2},
    "blocks": {"pattern": {"block": [2, 4]}},
    "fan-in": {"pattern": "fan_in"},
    "fan-out": {"pattern": "fan_out"},
    "diagonals": {"pattern": "diagonal"},
    "2 of 4 both ways": {"pattern": {"n": 2, "m": 4, "transposable": True}},
    "4 of 8 both ways": {"pattern": {"n": 4, "m": 8, "transposable": True}},
    "fan-in in groups": {"pattern": "fan_in", "balance_in_groups": 2},
    "blocks in groups": {"pattern": {"block": [2, 2]}, "balance_out_groups": 2},
}
every_pattern = pytest.mark.parametrize("changes", PATTERNS.values(), ids=PATTERNS)
PAIRS = [(name, key) for name in ALGORITHMS for key in PATTERNS]
REFUSED = [(name, key) for name, key in PAIRS if not takes_pattern(name, PATTERNS[key]["pattern"])]
every_pair = pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, PATTERNS[key], id=f"{name}, {key}")
        for name, key in PAIRS
        if (name, key) not in REFUSED
    ],
)


class Wanderer(DropAndGrow):
    """A custom algorithm that knows nothing of patterns: grows far from zero of a wave."""

    name = "wanderer"

    def grow_score(self, weight, dense_grad):
        return (torch.arange(weight.numel()).view_as(weight) * (1.7 + self.updates)).sin()


class Smallest(rarefy.DynamicSparsityAlgorithm):
    """A custom algorithm that gives the whole mask."""

    name = "smallest"

    def update_mask(self, weight, mask, sparsity, dense_grad):
        return self.keep_top(-weight.abs(), sparsity)


def block_for(name, changes):
    """Options under which an algorithm runs with a pattern; n of m asks for its own sparsity."""
    options = {"algorithm": name, "seed": 1, **options_of(name), **changes}
    pattern = changes.get("pattern")
    if isinstance(pattern, dict) and "n" in pattern:
        rising = {"type": "polynomial", "init": 0, "final": 0.5, "start": 0, "stop": 6}
        options["sparsity"] = rising if ROWS[name].sparsity == "scheduled" else 0.5
        if takes(name, "drop_fraction"):
            options["drop_fraction"] = 0.6
    return options


def layers(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 8, bias=False, dtype=dtype))


def prepared(model, options):
    sparsity = rarefy.configure(options)
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return sparsity, optimizer


def learn(model, optimizer, step):
    dtype = next(model.parameters()).dtype
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(step)).to(dtype)
    optimizer.zero_grad()
    (model(x) - x[:, :8]).square().mean().backward()
    optimizer.step()


def masks_of(sparsity):
    return [parameter.mask.clone() for parameter in sparse_parameters(sparsity)]


def assert_obeys(sparsity):
    for algorithm in sparsity.algorithms:
        shapes = {name: parameter.shape for name, parameter in algorithm.parameters.items()}
        targets = share_out(algorithm.distribution, algorithm.target_sparsity, shapes)
        for name, parameter in algorithm.parameters.items():
            pattern, mask = parameter.pattern, parameter.mask
            assert int(mask.sum()) == pattern.kept(mask.shape, targets[name])
            for piece in pattern.split(mask):
                assert pattern.structure.holds(piece, targets[name])


@every_pair
def test_the_pattern_holds_after_every_update_in_both_storages_alike(name, changes):
    # In float64, where no order of additions decides which connection grows.
    models = layers(torch.float64), layers(torch.float64)
    options = [{**block_for(name, changes), "compute": compute} for compute in ("masked", "compact")]
    runs = [prepared(model, one) for model, one in zip(models, options, strict=True)]
    first = masks_of(runs[0][0])
    moved = False
    for step in range(6):
        for model, (sparsity, optimizer) in zip(models, runs, strict=True):
            learn(model, optimizer, step)
            assert_obeys(sparsity)
            assert_exact_zeros(sparsity, optimizer)
        masks, compact = (masks_of(sparsity) for sparsity, _ in runs)
        assert all(torch.equal(a, b) for a, b in zip(masks, compact, strict=True))
        moved |= any(not torch.equal(a, b) for a, b in zip(masks, first, strict=True))
    assert moved == ROWS[name].moves


@pytest.mark.parametrize("name", [name for name in ALGORITHMS if (name, "2 of 4") not in REFUSED])
def test_convolutions_and_weights_of_three_dimensions(name):
    model = small_model()
    sparsity, optimizer = prepared(model, block_for(name, PATTERNS["2 of 4"]))
    for step in range(5):
        train_step(model, optimizer, step)
        assert_obeys(sparsity)
        channels = model[3].weight_mask.sum(1)
        assert len(set(channels.flatten().tolist())) == 1


@every_algorithm
@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize(
    "changes",
    [
        PATTERNS["2 of 4"],
        PATTERNS["fan-in"],
        {**PATTERNS["blocks"], "distribution": "erk"},
        {"distribution": "er"},
    ],
    ids=["2 of 4", "fan-in", "blocks, erk", "er"],
)
def test_resume_is_bit_identical(name, changes, compute):
    if "pattern" in changes and not takes_pattern(name, changes["pattern"]):
        return
    options = {**block_for(name, changes), "compute": compute}
    model = layers()
    sparsity, optimizer = prepared(model, options)
    for step in range(6):
        if step == 3:
            saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsity.state_dict()))
        learn(model, optimizer, step)
    resumed = layers(seed=9)
    again, other = prepared(resumed, {**options, "seed": 5})
    for target, state in zip((resumed, other, again), saved, strict=True):
        target.load_state_dict(state)
    for step in range(3, 6):
        learn(resumed, other, step)
    assert_identical(snapshot(model, optimizer), snapshot(resumed, other))
    assert str(rarefy.summary(sparsity)) == str(rarefy.summary(again))


@pytest.mark.parametrize(("name", "key"), REFUSED)
def test_what_a_method_cannot_do_is_refused_with_its_name(name, key):
    with pytest.raises(ConfigError, match=f"pattern: .* for {name}"):
        rarefy.configure(block_for(name, PATTERNS[key]))


# ---- n of m is the rule of the algorithm, group by group ----


def one_by_one(name, algorithm, weight, mask, dense_grad, update):
    """What the unstructured rule makes of each group of four, one after the other."""
    if name == "gmp":
        count = kept_count(4, algorithm.target_sparsity)
        return torch.stack([keep_top(group, count) for group in weight.abs().view(-1, 4)]).view_as(mask)
    grow = dense_grad.abs()
    if name == "set":
        grow = torch.rand(mask.shape, generator=generator_for(1, "weight", update))
    groups = []
    for w, old, g in zip(weight.abs().view(-1, 4), mask.view(-1, 4), grow.view(-1, 4), strict=True):
        active = int(old.sum())
        stay = min(active - round(0.6 * active), 2)
        kept = drop_lowest(old, w, active - stay)
        groups.append(grow_highest(kept, g, 2 - stay))
    return torch.stack(groups).view_as(mask)


@pytest.mark.parametrize("name", ["gmp", "set", "rigl"])
def test_every_update_agrees_with_a_loop_over_groups(name):
    torch.manual_seed(0)
    layer = nn.Linear(16, 10, bias=False)
    algorithm = rarefy.configure({**block_for(name, PATTERNS["2 of 4"]), "update": {"freq": 1}})
    algorithm.autoupdate = False
    algorithm.apply(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05)
    for update in range(1, 16):
        optimizer.zero_grad()
        inputs = torch.randn(4, 16)
        outputs = layer(inputs)
        (outputs - 1).square().sum().backward()
        dense_grad = (2 * (outputs - 1)).detach().T @ inputs
        mask = layer.weight_mask.clone()
        optimizer.step()
        weight = layer.weight.detach().clone()
        algorithm.step += 1
        algorithm.parameters["weight"].dense_gradient.value = dense_grad.clone()
        algorithm.update()
        assert torch.equal(layer.weight_mask, one_by_one(name, algorithm, weight, mask, dense_grad, update))


def test_gmp_comes_to_two_of_four_from_below():
    layer = nn.Linear(8, 8)
    schedule = {"type": "linear", "init": 0, "slope": 0.25}
    algorithm = rarefy.configure({"algorithm": "gmp", "sparsity": schedule, "pattern": {"n": 2, "m": 4}})
    algorithm.apply(layer)
    counts = [set(layer.weight_mask.view(-1, 4).sum(1).tolist())]
    for _ in range(4):
        algorithm.step += 1
        algorithm.update()
        counts.append(set(layer.weight_mask.view(-1, 4).sum(1).tolist()))
    assert counts == [{4}, {3}, {2}, {2}, {2}]
    assert algorithm.target_sparsity == 0.5


@pytest.mark.parametrize("name", ["set", "rigl"])
@every_pattern
def test_a_dense_start_goes_to_the_pattern_at_the_first_update(name, changes):
    model = layers()
    options = {**block_for(name, changes), "update": {"freq": 2, "start": 2}}
    sparsity, optimizer = prepared(model, options)
    learn(model, optimizer, 0)
    assert all(parameter.mask.all() for parameter in sparse_parameters(sparsity))
    learn(model, optimizer, 1)
    assert_obeys(sparsity)
    assert not any(parameter.mask.all() for parameter in sparse_parameters(sparsity))


@pytest.mark.parametrize("init_method", ["random", "topk", "checkerboard"])
@every_pattern
def test_first_masks(init_method, changes):
    sparsity = rarefy.configure({**block_for("static", changes), "init_method": init_method})
    sparsity.apply(layers())
    assert_obeys(sparsity)


# ---- custom algorithms ----


@pytest.mark.parametrize("kind", [Wanderer, Smallest])
@every_pattern
def test_custom_algorithms_obey(kind, changes):
    options = {key: value for key, value in block_for("set", changes).items() if key != "algorithm"}
    if kind is Smallest:
        options.pop("drop_fraction", None)
    model = layers()
    sparsity = kind(**options)
    sparsity.apply(model)
    first = model[0].weight_mask.clone()
    for _ in range(4):
        sparsity.update()
        assert_obeys(sparsity)
    assert not torch.equal(model[0].weight_mask, first)


@every_pattern
def test_a_custom_mask_without_the_pattern_is_refused(changes):
    class Everywhere(rarefy.DynamicSparsityAlgorithm):
        def update_mask(self, weight, mask, sparsity, dense_grad):
            return keep_top(torch.rand_like(weight), kept_count(weight.numel(), sparsity))

    options = {key: value for key, value in block_for("static", changes).items() if key != "algorithm"}
    sparsity = Everywhere(**options)
    sparsity.apply(layers())
    with pytest.raises(RarefyError) as caught:
        sparsity.update()
    assert str(caught.value) == (
        f"Everywhere.update_mask returned a mask that does not obey the pattern {sparsity.pattern.structure}; choose "
        "with self.keep_top(scores, sparsity)"
    )


# ---- distributions ----


@every_algorithm
@pytest.mark.parametrize("distribution", ["er", "erk"])
def test_a_distribution_holds_at_every_update(name, distribution):
    model = small_model()
    sparsity, optimizer = prepared(model, block_for(name, {"distribution": distribution}))
    for step in range(5):
        train_step(model, optimizer, step)
        assert_obeys(sparsity)
        kept = sum(int(parameter.mask.sum()) for parameter in sparse_parameters(sparsity))
        total = sum(parameter.mask.numel() for parameter in sparse_parameters(sparsity))
        # A fan-in is rounded for each output.
        off = 3 if takes_pattern(name, "unstructured") else 40
        assert abs(kept - round((1 - sparsity.target_sparsity) * total)) <= off
    assert len({round(row.target, 6) for row in rarefy.summary(sparsity).rows}) > 1


def test_target_hooks_hear_the_share_of_each_parameter():
    heard, sparsity = {}, rarefy.configure({"sparsity": 0.8, "distribution": "erk"})
    sparsity.register_target_sparsity_hook(lambda _, name, value: heard.update({name: value}))
    sparsity.apply(layers())
    assert heard == {row.name: row.target for row in rarefy.summary(sparsity).rows}
    assert heard["0.weight"] > 0.8 > heard["2.weight"]
    mean = (heard["0.weight"] * 384 + heard["2.weight"] * 192) / 576
    assert mean == pytest.approx(0.8)


def test_a_distribution_is_over_one_entry():
    """Each glob of a dict and each entry of a list keeps its own sparsity."""
    filters = {"0.weight": {"sparsity": 0.5}, "*.weight": {}}
    group = rarefy.configure({"sparsity": 0.75, "distribution": "erk", "param_filter": filters})
    group.apply(layers())
    assert [row.target for row in rarefy.summary(group).rows] == pytest.approx([0.5, 0.75])


def test_a_distribution_over_blocks_in_groups():
    changes = {"distribution": "er", "pattern": {"block": [2, 2]}, "balance_in_groups": 2}
    sparsity = rarefy.configure(block_for("set", changes))
    sparsity.apply(layers())
    sparsity.update()
    assert_obeys(sparsity)
    first, second = (row.actual for row in rarefy.summary(sparsity).rows)
    assert first > 0.75 > second


# ---- errors ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sparsity": 0.4, "pattern": {"n": 3, "m": 5}},
            "sparsity.pattern: {n: 3, m: 5} is not allowed; give an m that divides the 16 input features of 0.weight "
            "[24, 16]",
        ),
        (
            {"sparsity": 0.5, "param_filter": {"[02].weight": {"pattern": {"block": [3, 4]}}}},
            "sparsity.param_filter.[02].weight.pattern: {block: [3, 4]} is not allowed; give blocks that divide the 8 "
            "output and the 24 input features of 2.weight [8, 24]",
        ),
    ],
)
def test_weights_that_do_not_divide_are_named_before_anything_changes(options, message):
    model = layers()
    with pytest.raises(ConfigError) as caught:
        rarefy.configure(options).apply(model)
    assert str(caught.value) == message
    assert not any(name.endswith("_mask") for name in model.state_dict())


@pytest.mark.parametrize(
    ("n", "m", "written"), [(1, 3, 0.667), (2, 3, 0.3333), (1, 8, 0.875), (3, 16, 0.8125)]
)
def test_the_sparsity_may_be_written_to_three_digits(n, m, written):
    layer = nn.Linear(m * 2, 4)
    rarefy.configure({"sparsity": written, "pattern": {"n": n, "m": m}}).apply(layer)
    assert set(layer.weight_mask.view(-1, m).sum(1).tolist()) == {n}
