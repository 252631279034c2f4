"""The table of what is sparse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from rarefy.algorithms.summary import summary


def applied(block):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    return model, sparsity


def test_rows_are_counted_in_the_weights():
    model, sparsity = applied(
        [{"sparsity": 0.75, "param_filter": "0.weight"}, {"algorithm": "set", "sparsity": 0.5}]
    )
    first, second = summary(sparsity).rows
    assert (first.name, first.algorithm, first.shape, first.storage) == (
        "0.weight",
        "static",
        (8, 8),
        "masked",
    )
    assert (first.target, first.actual) == (0.75, 0.75)
    assert (second.name, second.algorithm, second.actual) == ("1.weight", "set", 0.5)
    model.get_parameter("0.weight").data.fill_(1.0)
    assert summary(sparsity).rows[0].actual == 0.0 and summary(sparsity).rows[0].target == 0.75


def test_rows_tell_the_exact_count_and_the_pattern():
    _, sparsity = applied({"sparsity": 0.5, "pattern": {"n": 2, "m": 4}, "balance_out_groups": 2})
    first, second = summary(sparsity).rows
    assert (first.kept, first.pattern) == (32, "balance_out_groups: 2, {n: 2, m: 4}")
    assert second.kept == 16
    row, total = (
        next(line for line in str(summary(sparsity)).splitlines() if w in line) for w in ("0.w", "all")
    )
    assert "{n: 2, m: 4}" in row and "32" in row and "48" in total


def test_targets_are_those_of_each_parameter():
    _, sparsity = applied({"algorithm": "set", "sparsity": 0.75, "distribution": "erk"})
    first, second = summary(sparsity).rows
    assert first.target > 0.75 > second.target
    assert 64 * first.target + 32 * second.target == pytest.approx(0.75 * 96)


def test_the_total_weighs_parameters_by_size():
    _, sparsity = applied(
        [{"sparsity": 0.75, "param_filter": "0.weight"}, {"algorithm": "set", "sparsity": 0.5}]
    )
    assert summary(sparsity).actual_sparsity == pytest.approx((48 + 16) / 96)


def test_nothing_applied_yet():
    assert summary(rarefy.configure(0.5)).rows == ()
    assert summary(rarefy.configure(0.5)).actual_sparsity == 0.0


def test_it_prints_as_a_table():
    _, sparsity = applied(0.75)
    text = str(summary(sparsity))
    header, row, total = (
        next(line for line in text.splitlines() if word in line) for word in ("parameter", "0.weight", "all")
    )
    for word in ("algorithm", "shape", "target", "actual", "kept", "pattern", "storage"):
        assert word in header
    for word in ("static", "8 × 8", "0.7500", "16", "unstructured", "masked"):
        assert word in row
    assert "96 weights" in total and "0.7500" in total


def test_a_custom_algorithm_without_a_name_shows_its_class():
    class Mine(rarefy.Static):
        name = ""

    sparsity = Mine(0.5)
    sparsity.apply(nn.Linear(2, 2))
    assert summary(sparsity).rows[0].algorithm == "Mine"


def test_it_says_why_each_parameter_was_taken_or_left():
    _, sparsity = applied(
        [{"sparsity": 0.75, "param_filter": "0.weight"}, {"algorithm": "set", "sparsity": 0.5}]
    )
    found = summary(sparsity)
    assert [row.reason for row in found.rows] == ["0.weight", "default filter: weight of a Linear"]
    why = "no glob matches; fewer than two dimensions"
    assert found.dense == {"0.bias": why, "1.bias": why}
    lines = [
        "sparse, 0.weight: 0.weight",
        "sparse, default filter: weight of a Linear: 1.weight",
        f"dense, {why}: 0.bias, 1.bias",
    ]
    assert str(found).splitlines()[-3:] == lines
    assert found._repr_html_().endswith("".join(f"<div>{line}</div>" for line in lines))


def test_layers_of_one_kind_share_a_glob():
    model = nn.Sequential(nn.Embedding(4, 4), *(nn.Linear(4, 4) for _ in range(3)))
    sparsity = rarefy.Static(0.5)
    sparsity.apply(model)
    assert summary(sparsity).reasons() == [
        "sparse, default filter: weight of a Linear: *.weight (3)",
        "dense, belongs to Embedding: 0.weight",
        "dense, fewer than two dimensions: *.bias (3)",
    ]


def test_a_long_list_of_names_is_cut():
    class Norms(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4, bias=False)
            for letter in "abcdefgh":
                self.register_parameter(letter, nn.Parameter(torch.ones(4)))

    model, sparsity = Norms(), rarefy.Static(0.5)
    sparsity.apply(model)
    assert summary(sparsity).reasons()[1] == "dense, fewer than two dimensions: a, b, c, d, e, f and 2 more"


def test_nothing_is_said_of_a_model_that_is_gone():
    model, sparsity = applied(0.75)
    del model
    assert summary(sparsity).dense == {} and [row.reason for row in summary(sparsity).rows] == ["", ""]
