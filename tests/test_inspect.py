"""What `rarefy inspect` measures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.checkpoint.saved_model import SavedModel
from rarefy.config import patterns_of
from rarefy.report.inspection import Balance, Inspected, Totals, inspect, quantiles


def saved(state: dict[str, Tensor], sparsity: Any = None) -> SavedModel:
    params = {} if sparsity is None else {"trainer": {"init": {"sparsity": sparsity}}}
    return SavedModel(Path("run"), state, params)


def masked(mask: Tensor, name: str = "fc.weight") -> dict[str, Tensor]:
    return {name: torch.where(mask, 2.0, 0.0), f"{name}_mask": mask}


def only(state: dict[str, Tensor], sparsity: Any = None) -> Inspected:
    [row], problem = inspect(saved(state, sparsity))
    assert problem == ""
    return row


MASK = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()


def test_sparsity_and_dead_rows_and_columns() -> None:
    row = only(masked(MASK))
    assert (row.name, row.shape, row.storage, row.is_sparse) == ("fc.weight", (3, 4), "masked", True)
    assert (row.active, row.size, row.sparsity) == (3, 12, 0.75)
    assert (row.dead_rows, row.dead_columns) == (1, 2)
    assert row.quantiles == (2.0, 2.0, 2.0)


def test_active_connections_are_those_of_the_mask_though_a_weight_is_zero() -> None:
    row = only({"w": torch.zeros(3, 4), "w_mask": MASK})
    assert (row.active, row.dead_rows, row.quantiles) == (3, 1, (0.0, 0.0, 0.0))


def test_dense_tensors_and_their_zeros() -> None:
    rows, _ = inspect(saved({"bias": torch.tensor([0.0, -1.0]), "count": torch.tensor(3)}))
    assert [(row.storage, row.sparsity, row.dead_rows) for row in rows] == [
        ("dense", 0.5, None),
        ("dense", 0.0, None),
    ]
    assert [row.quantiles for row in rows] == [(1.0,) * 3, (None,) * 3]


def test_convolutions_have_dead_channels() -> None:
    mask = torch.zeros(4, 3, 2, 2, dtype=torch.bool)
    mask[0, 1, 1, 1] = mask[2, 1, 0, 0] = True
    row = only(masked(mask))
    assert (row.dead_rows, row.dead_columns) == (2, 2)


def test_tied_tensors_appear_once() -> None:
    weight = torch.ones(2, 2)
    rows, _ = inspect(saved({"a": weight, "b": weight}))
    assert [row.name for row in rows] == ["a"]


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.75, None),
        ({"sparsity": 0.75, "balance_out_groups": 3}, Balance("balance_out_groups", 3, 0.5, 1.0)),
        ({"sparsity": 0.75, "balance_in_groups": 2}, Balance("balance_in_groups", 2, 1 - 2 / 6, 1 - 1 / 6)),
        (
            {"sparsity": 0.75, "param_filter": {"*x*": {}, "fc.*": {"balance_in_groups": 2}}},
            Balance("balance_in_groups", 2, 1 - 2 / 6, 1 - 1 / 6),
        ),
        ([{"sparsity": 0.1, "param_filter": "fc*"}, {"sparsity": 0.1, "balance_in_groups": 2}], None),
        (
            {"groups": [{"type": "my:Own", "params": {"schedule": 0.1, "balance_out_groups": 1}}]},
            Balance("balance_out_groups", 1, 0.75, 0.75),
        ),
    ],
)
def test_the_balance_of_groups(sparsity: Any, expected: Balance | None) -> None:
    assert only(masked(MASK), sparsity).balance == expected


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [
        (0.75, "unstructured"),
        ({"sparsity": 0.5, "pattern": {"n": 1, "m": 2}}, "{n: 1, m: 2}"),
        ({"sparsity": 0.75, "balance_in_groups": 2, "pattern": {"block": [3, 2]}}, "{block: [3, 2]}"),
        ([{"sparsity": 0.1, "param_filter": "x*"}], "unstructured"),
        (None, ""),
    ],
)
def test_the_pattern(sparsity: Any, expected: str) -> None:
    assert only(masked(MASK), sparsity).pattern == expected


@pytest.mark.parametrize(
    "sparsity",
    [
        {"sparsity": 0.75, "balance_out_groups": 2},
        {"sparsity": 0.75, "pattern": "spiral"},
        {"sparsity": 0.75, "param_filter": 3},
        "much",
    ],
)
def test_a_block_that_does_not_fit_is_reported(sparsity: Any) -> None:
    [row], problem = inspect(saved(masked(MASK), sparsity))
    assert "is not allowed; give" in problem and "\n" not in problem
    assert row.balance is None and row.active == 3


def test_patterns_of_a_block_import_nothing() -> None:
    block = [{"algorithm": "no_such_module:X", "sparsity": 0.5, "init_method": "no_such_module:f"}]
    assert [globs for globs, _ in patterns_of(block)] == [None]


def test_totals() -> None:
    rows, _ = inspect(saved(masked(MASK) | {"bias": torch.ones(3)}))
    total = Totals.of(rows)
    assert (total.parameters, total.size, total.active, total.sparsity) == (2, 15, 6, 0.6)
    assert Totals.of([]).sparsity == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_quantiles(dtype: torch.dtype) -> None:
    values = torch.arange(101).flip(0).to(dtype)
    assert quantiles(values, (0.0, 0.05, 0.5, 0.95, 1.0)) == (0.0, 5.0, 50.0, 95.0, 100.0)
    values[-1] = torch.nan
    assert quantiles(values, (0.0, 1.0)) == (1.0, None)
