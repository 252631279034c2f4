"""Weights that would keep hardly a connection are named once, with the filter that leaves them dense."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import RarefyError


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


@pytest.mark.parametrize("algorithm", ["set", "rigl", "mest"])
def test_methods_by_which_outputs_lose_their_last_connection_name_the_option(algorithm):
    def text(options):
        (text,) = warned({"algorithm": algorithm, "sparsity": 0.9, **options}, Classifier())
        return text

    advice = "keeps 6 of 64 connections (keep_rows: true keeps one of each output); to leave"
    assert advice in text({})
    assert "keep_rows" not in text({"keep_rows": True})
    assert "keep_rows" not in text({"sparsity": 0.97, "param_filter": "head.weight"}), "fewer than outputs"


def loss(model, batch):
    return model.head(batch).square().mean() + sum(layer.weight.square().mean() for layer in model.layers)


@pytest.mark.parametrize(
    ("options", "is_even"),
    [
        ({"init_method": {"name": "snip", "batches": [torch.ones(2, 16)], "loss": loss}}, True),
        (
            {"init_method": {"name": "snip", "batches": [torch.ones(2, 16)], "loss": loss, "scope": "layer"}},
            False,
        ),
        ({"algorithm": "gmp", "sparsity": [0.0, 0.9], "distribution": "global"}, True),
        ({"init_method": "topk"}, False),
    ],
)
def test_where_weights_compete_the_numbers_are_called_even_shares(options, is_even):
    (text,) = warned({"sparsity": 0.9, **options}, Classifier())
    assert "head.weight [4, 16] keeps 6 of 64 connections" in text
    assert ("connections if all weights keep the same share;" in text) == is_even


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


def refusal_of_empty(sparsity, model):
    with pytest.raises(RarefyError) as caught:
        sparsity.apply(model)
        sparsity.update()
    return str(caught.value)


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_schedule_that_comes_to_one_is_refused_at_that_update(compute):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    sparsity = rarefy.GMP(lambda step: 0.5 + step / 2, compute=compute)
    sparsity.apply(model)
    sparsity.step = 1
    with pytest.raises(RarefyError) as caught:
        sparsity.update()
    assert str(caught.value) == (
        "0.weight would have no connection left at step 1 (target sparsity 1); give a sparsity that stays below 1, a "
        "mask with connections, or a param_filter without this weight"
    )
    assert int(model[0].weight_mask.sum()) == 128


def test_masks_of_ones_own_without_connections_are_refused():
    class Nothing(rarefy.DynamicSparsityAlgorithm):
        def update_mask(self, view):
            return torch.zeros_like(view.mask)

    assert "0.weight would have no connection" in refusal_of_empty(
        Nothing(0.5), nn.Sequential(nn.Linear(16, 16))
    )
    nowhere = rarefy.Static(0.5, init_method=lambda weight, sparsity: weight > 9)
    assert "0.weight would have no connection" in refusal_of_empty(nowhere, nn.Sequential(nn.Linear(16, 16)))


@pytest.mark.parametrize("name", ["gmp", "set", "rigl", "granet"])
def test_a_layer_of_zeros_does_not_lose_its_last_rows(name):
    """Where all scores are equal a seeded order decides, not the place: from 0.9 to 0.5, and from zeros."""
    layer = nn.Linear(64, 64)
    nn.init.zeros_(layer.weight)
    sparsity = rarefy.configure({"algorithm": name, "sparsity": [0.9, 0.5], "init_method": "topk", "seed": 0})
    sparsity.apply(layer)
    [algorithm] = sparsity.algorithms
    for kept in (410, 2048):
        assert int(layer.weight_mask.sum()) == kept
        rows = layer.weight_mask.sum(1).double()
        # As many in each row as chance gives: the binomial's spread.
        assert rows.min() >= 1 or kept == 410
        assert rows.std() < 2 * (kept / 64) ** 0.5
        algorithm.parameters["weight"].dense_gradient.value = torch.zeros(64, 64)
        algorithm.update()


@pytest.mark.parametrize("keep_rows", [False, True])
def test_biases_and_single_numbers_may_be_named(keep_rows):
    """The bias of a transposed convolution has outputs alone, and a number has neither."""
    model = nn.Module()
    model.layer = nn.ConvTranspose1d(8, 16, 3)
    model.temperature = nn.Parameter(torch.ones(()))
    sparsity = rarefy.SET(0.5, param_filter="*", keep_rows=keep_rows, seed=0)
    sparsity.apply(model)
    sparsity.update()
    assert {name: one.active for name, one in sparsity.parameters.items()} == {
        "temperature": 1,
        "layer.weight": 8 * 16 * 3 // 2,
        "layer.bias": 8,
    }


def test_balanced_groups_of_a_transposed_bias():
    layer = nn.ConvTranspose1d(8, 16, 3)
    rarefy.configure({"sparsity": 0.5, "param_filter": "bias", "balance_out_groups": 4}).apply(layer)
    assert layer.bias_mask.view(4, 4).sum(1).tolist() == [2, 2, 2, 2]
