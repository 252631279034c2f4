"""Weights that would keep hardly a connection are named once, with the filter that leaves them dense."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rarefy


class Classifier(nn.Module):
    def __init__(self, width=64):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.head = nn.Linear(16, 4)


def warned(block, model):
    """The texts of all warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rarefy.configure(block).apply(model)
    return [str(one.message) for one in caught]


def test_one_warning_names_the_weight_and_the_filter_that_leaves_it_dense():
    (text,) = warned(0.9, Classifier())
    assert text == (
        "fewer than 4 connections an output: head.weight [4, 16] keeps 6 of 64 connections; to leave them dense, "
        "give param_filter: layers.*.weight"
    )
    model = Classifier()
    assert not warned({"sparsity": 0.9, "param_filter": "layers.*.weight"}, model)
    assert not hasattr(model.head, "weight_mask")


def test_many_are_one_warning_too():
    (text,) = warned(0.99, Classifier())
    assert text.startswith(
        "fewer than 4 connections an output: layers.0.weight [64, 64] keeps 41 of 4096 connections;"
    )
    assert "; layers.2.weight" in text and " and 1 more; " in text and "requires_dense = True" in text


def test_a_group_warns_once_for_all_members():
    entries = [{"sparsity": 0.99, "param_filter": "layers.0.*weight"}, {"sparsity": 0.9}]
    (text,) = warned(entries, Classifier())
    assert (
        "layers.0.weight" in text
        and "head.weight" in text
        and "give param_filter: layers.*.weight" not in text
    )


def test_the_highest_sparsity_of_a_schedule_counts():
    def block(final):
        return {
            "algorithm": "gmp",
            "sparsity": {"type": "polynomial", "init": 0, "final": final, "start": 0, "stop": 9},
        }

    assert not warned(block(0.5), Classifier())
    assert len(warned(block(0.9), Classifier())) == 1


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_small_weights_that_keep_enough_are_not_named(sparsity):
    assert not warned(sparsity, nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("shape", "sparsity", "options"),
    [
        ((16, 1), 0.98, {}),
        ((3, 1), 0.9, {}),
        ((8, 4), 0.99, {"balance_in_groups": 4}),
        ((4, 4), 0.99, {"pattern": {"block": [2, 2]}}),
    ],
)
@pytest.mark.parametrize("algorithm", ["static", "rigl", "set"])
def test_no_layer_ends_without_a_connection(shape, sparsity, options, algorithm):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, shape[0]), nn.ReLU(), nn.Linear(*shape))
    sparsity = rarefy.configure(
        {"algorithm": algorithm, "sparsity": sparsity, "param_filter": "2.weight", **options}
    )
    sparsity.apply(net)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    sparsity.apply(optimizer)
    for _ in range(4):
        net(torch.randn(64, 32)).square().mean().backward()
        optimizer.step()
    row = rarefy.summary(sparsity).rows[0]
    assert row.kept == int((net[2].weight_mask).sum()) >= 1
    assert row.target > row.actual
    assert torch.equal(net[2].weight != 0, net[2].weight_mask)
