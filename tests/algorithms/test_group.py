"""Several algorithms on one model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from helpers import assert_exact_zeros, small_model, train_step
from rarefy.errors import ConfigError, RarefyError


def three_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 12))


def test_the_first_matching_entry_wins():
    model = three_layers()
    group = rarefy.configure(
        [
            {"sparsity": 0.25, "param_filter": "0.*weight"},
            {"algorithm": "set", "sparsity": 0.5, "param_filter": ["0.weight", "1.weight"]},
            {"algorithm": "rigl", "sparsity": 0.75},
        ]
    )
    group.apply(model)
    assert [list(a.parameters) for a in group.algorithms] == [["0.weight"], ["1.weight"], ["2.weight"]]
    assert [round(rarefy.masks.sparsity_of(layer.weight_mask), 6) for layer in model] == [0.25, 0.5, 0.75]


def test_each_member_follows_its_own_schedule():
    model = three_layers()
    group = rarefy.Group(
        [
            rarefy.SET(0.5, param_filter="0.weight", update={"freq": 2}),
            rarefy.RigL(0.5, param_filter="1.weight", update={"freq": 3}),
        ]
    )
    group.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    group.apply(optimizer)
    changed = {"0.weight": [], "1.weight": []}
    group.register_topology_hook(lambda a, name, old, new: changed[name].append(a.step))
    for step in range(6):
        train_step(model, optimizer, step)
        assert_exact_zeros(group, optimizer)
    assert changed == {"0.weight": [2, 4, 6], "1.weight": [3, 6]}
    assert "2.weight_mask" not in model.state_dict()


def test_a_dict_filter_is_a_group_of_overlays():
    model = three_layers()
    group = rarefy.configure(
        {
            "algorithm": "rigl",
            "sparsity": 0.5,
            "param_filter": {"0.*": {"balance_out_groups": 5}, "*.weight": None},
        }
    )
    with pytest.raises(ConfigError, match=r"balance_out_groups: 5 is not allowed"):
        group.apply(model)
    model = three_layers()
    group = rarefy.configure(
        {
            "algorithm": "rigl",
            "sparsity": 0.5,
            "param_filter": {"0.weight": {"sparsity": 0.75}, "*.weight": {}},
        }
    )
    group.apply(model)
    assert [round(rarefy.masks.sparsity_of(layer.weight_mask), 6) for layer in model] == [0.75, 0.5, 0.5]


def test_state_is_a_list_and_its_length_is_checked():
    model = three_layers()
    group = rarefy.configure(
        [{"sparsity": 0.5, "param_filter": "0.weight"}, {"algorithm": "set", "sparsity": 0.9}]
    )
    group.apply(model)
    state = group.state_dict()
    assert [part["algorithm"] for part in state] == ["static", "set"]
    group.load_state_dict(state)
    with pytest.raises(RarefyError, match=r"is of 1 algorithm\(s\), this group has 2"):
        group.load_state_dict(state[:1])
    with pytest.raises(RarefyError, match=r"is of 1 algorithm\(s\), this group has 2"):
        group.load_state_dict(state[0])


def test_an_empty_group_is_refused():
    with pytest.raises(RarefyError, match="give at least one algorithm"):
        rarefy.Group([])


def test_groups_nest_and_autoupdate_reaches_every_member():
    group = rarefy.Group([rarefy.Group([rarefy.SET(0.5, param_filter="0.weight")]), rarefy.SET(0.5)])
    group.autoupdate = False
    assert [a.autoupdate for a in group.algorithms] == [False, False]
    model = small_model()
    group.apply(model)
    before = model[0].weight_mask.clone()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    group.apply(optimizer)
    train_step(model, optimizer, 0)
    assert torch.equal(model[0].weight_mask, before)
    group.update()
    assert not torch.equal(model[0].weight_mask, before)


def test_hooks_reach_every_member():
    model, seen = three_layers(), []
    group = rarefy.configure(
        [{"sparsity": 0.5, "param_filter": "0.weight"}, {"algorithm": "set", "sparsity": 0.75}]
    )
    group.register_target_sparsity_hook(lambda a, name, value: seen.append((name, value)))
    group.register_computed_sparsity_hook(lambda a, name, value: seen.append((name, value)))
    group.apply(model)
    assert set(seen) == {("0.weight", 0.5), ("1.weight", 0.75), ("2.weight", 0.75)}
    assert len(seen) == 6


def tied_layers():
    model = three_layers()
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize("given", ["1.weight", ["1.weight", "2.weight"]])
def test_a_tied_weight_goes_by_its_first_name(given):
    members = [{"sparsity": 0.5, "param_filter": "0.weight"}, {"sparsity": 0.9, "param_filter": given}]
    for block in (members, members[::-1], members[1]):
        with pytest.raises(
            ConfigError,
            match=r"'1\.weight' \(1\.weight is tied to 0\.weight\) is not allowed; .* \(example: param_filter: 0\.w",
        ):
            rarefy.configure(block).apply(tied_layers())


def test_filters_that_divide_a_tied_weight_are_refused():
    model = tied_layers()
    members = [
        {"sparsity": 0.5, "param_filter": "[12].weight"},
        {"sparsity": 0.9, "param_filter": "*.weight"},
    ]
    with pytest.raises(
        ConfigError,
        match=r"^sparsity\[0\]\.param_filter: \[12\]\.weight \(1\.weight is tied to 0\.weight, which another "
        r"filter takes\) is not allowed; give a filter that matches 0\.weight as well, or neither",
    ):
        rarefy.configure(members).apply(model)
    assert not list(model.buffers())
    # the first filter that takes it by its first name goes before what a later one says of the second
    group = rarefy.configure([{**members[0], "param_filter": "[02].weight"}, members[1]])
    group.apply(model)
    assert [list(one.parameters) for one in group.algorithms] == [["0.weight", "2.weight"], []]


def in_a_group(model, block):
    rarefy.configure([block, {"sparsity": 0.5, "param_filter": "2.bias"}]).apply(model)


def alone(model, block):
    rarefy.configure(block).apply(model)


def pruned_at_once(model, block):
    rarefy.prune(model, method="magnitude", **block)


@pytest.mark.parametrize("use", [alone, in_a_group, pruned_at_once])
def test_a_glob_that_matches_a_tied_weight_by_its_second_name_alone_is_refused(use):
    """It matches other weights as well, and would leave that one dense without a word."""
    model = tied_layers()
    with pytest.raises(
        ConfigError,
        match=r"param_filter: \[12\]\.weight \(1\.weight is tied to 0\.weight, which no glob matches\) is not "
        r"allowed; give globs that match 0\.weight too",
    ):
        use(model, {"sparsity": 0.5, "param_filter": "[12].weight"})
    assert not list(model.buffers())
    model[0].requires_dense = True
    use(model, {"sparsity": 0.5, "param_filter": "[12].weight"})
    assert bool(model[0].weight.detach().ne(0).all()) and not bool(model[2].weight.detach().ne(0).all())


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("together", [True, False], ids=["a group", "two algorithms"])
@pytest.mark.parametrize("owner", [0, 1])
def test_weights_of_two_algorithms_that_are_tied_afterwards_are_refused(compute, together, owner):
    model = three_layers()
    members = [
        {"sparsity": 0.5, "param_filter": "0.weight", "compute": compute},
        {"algorithm": "set", "sparsity": 0.75, "param_filter": "1.weight", "compute": compute},
    ]
    several = [rarefy.configure(members)] if together else [rarefy.configure(one) for one in members]
    for sparsity in several:
        sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for sparsity in several:
        sparsity.apply(optimizer)
    train_step(model, optimizer, 0)
    model[1 - owner].weight = model[owner].weight
    with pytest.raises(
        RarefyError, match=rf"{owner}\.weight and {1 - owner}\.weight are one tensor now, and have two masks"
    ):
        train_step(model, optimizer, 1)
