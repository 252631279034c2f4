"""How a group gets its members: lists, mappings from filters, one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rarefy import SET, Group, Static
from rarefy.errors import ConfigError, RarefyError


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))


def test_a_mapping_gives_each_algorithm_its_filter() -> None:
    network = model()
    group = Group({"0.weight": Static(0.5), ("1.weight", "2.w*"): SET(0.75)})
    group.apply(network)
    assert [int(layer.weight_mask.sum()) for layer in network] == [32, 16, 16]


def test_members_are_added_in_order_of_precedence() -> None:
    network = model()
    group = Group()
    group.add("0.weight", Static(0.5))
    group.extend({"*": Static(0.75)})
    group.extend([Static(0.25, param_filter="2.weight")])
    group.extend(Group([Static(0.0)]))
    group.apply(network)
    assert [int(layer.weight_mask.sum()) for layer in network] == [32, 16, 16]
    assert len(group.algorithms) == 4


@pytest.mark.parametrize("members", [[], {}])
def test_no_members(members: Any) -> None:
    with pytest.raises(RarefyError, match=r"Group\(\[\]\) is empty"):
        Group(members)


@pytest.mark.parametrize(("members", "shown"), [([Static(0.5), 3], "3"), ("rigl", "'r'"), (Static, "Static")])
def test_members_that_are_no_algorithms(members: Any, shown: str) -> None:
    with pytest.raises(RarefyError, match=f"{shown}.* is not allowed in a Group; give algorithms"):
        Group(members)


def test_an_empty_group_is_not_applied() -> None:
    with pytest.raises(RarefyError, match="the group is empty; add at least one"):
        Group().apply(model())


def test_a_filter_takes_one_algorithm_that_was_not_applied() -> None:
    with pytest.raises(RarefyError, match=r"Group is not allowed for '\*'; give one algorithm to a filter"):
        Group({"*": Group([Static(0.5)])})
    applied = Static(0.5)
    applied.apply(model())
    with pytest.raises(RarefyError, match="was applied already"):
        Group({"*": applied})
    with pytest.raises(ConfigError, match="param_filter"):
        Group({"": Static(0.5)})


def test_apply_of_the_model_is_refused_with_the_right_call() -> None:
    for sparsity in (Static(0.5), Group([Static(0.5)])):
        with pytest.raises(RarefyError, match=r"call sparsity.apply\(model\)"):
            model().apply(sparsity)
    assert torch.is_tensor(model()[0].weight)
