"""Finished 2:4 weights in the format in which torch gives them to the sparse matrix units of GPUs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy

FORMAT = "torch.sparse._semi_structured_conversions"


@pytest.mark.parametrize("transposable", [False, True])
def test_a_finished_weight_goes_through_torchs_format_without_loss(transposable: bool) -> None:
    conversions = pytest.importorskip(FORMAT)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 64))
    pattern = {"n": 2, "m": 4, **({"transposable": True} if transposable else {})}
    rarefy.configure({"algorithm": "static", "sparsity": 0.5, "pattern": pattern}).apply(model)
    weight = rarefy.finalize(model)[0].weight.detach().bfloat16()
    values, places = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    # Half of each row; a weight of another pattern would lose what does not fit.
    assert values.shape == (64, 64)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(values, places), weight)


def test_a_weight_without_the_pattern_would_lose_something() -> None:
    conversions = pytest.importorskip(FORMAT)
    weight = torch.ones(64, 128, dtype=torch.bfloat16)
    parts = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert not torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*parts), weight)
