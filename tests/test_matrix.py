"""What goes with what: the page is what the code does, and each combination keeps its promises in every dtype."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from contract_rows import takes_pattern
from document_blocks import DOCS
from helpers import assert_exact_zeros, assert_identical, snapshot
from matrix_page import MATRIX, options, works
from rarefy.distributions import DISTRIBUTIONS
from rarefy.methods.registry import ALGORITHMS

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


def test_the_page_is_what_the_code_does() -> None:
    remedy = "methods, patterns, distributions or storages have changed: run docs/scripts/matrix.py"
    assert MATRIX.matrix_page() == (DOCS / "matrix.md").read_text(encoding="utf-8"), remedy


def test_the_rows_of_the_contract_refuse_what_the_methods_refuse() -> None:
    for method in ALGORITHMS:
        for key, pattern in MATRIX.PATTERNS.items():
            one = MATRIX.Combination(method, key, "uniform", "masked")
            assert takes_pattern(method, pattern) == (not MATRIX.tried(one).reason), (method, key)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda mask: mask.roll(1, 0), "inactive weights"),
        (lambda mask: mask.tril(), "does not obey fan_in"),
        (torch.zeros_like, "another count"),
    ],
)
def test_a_combination_that_breaks_its_promise_is_found(broken: Any, message: str) -> None:
    algorithm = MATRIX.built(MATRIX.Combination("static", "fan_in", "uniform", "masked"))
    model = nn.Linear(MATRIX.WIDTH, MATRIX.WIDTH, bias=False)
    algorithm.apply(model)
    MATRIX.train(algorithm, model)
    assert MATRIX.checked(algorithm) == "masked"
    model.weight_mask.copy_(broken(model.weight_mask))
    with pytest.raises(AssertionError, match=message):
        MATRIX.checked(algorithm)


# ---- in every dtype, over several updates, through a resume ----


class Training:
    """A model, its algorithm and its optimizer."""

    def __init__(self, method: str, chosen: dict[str, Any], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.dtype = dtype
        self.model = nn.Sequential(nn.Linear(16, 24, dtype=dtype), nn.Tanh(), nn.Linear(24, 8, dtype=dtype))
        self.sparsity = ALGORITHMS[method](**chosen)
        self.sparsity.apply(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.sparsity.apply(self.optimizer)

    def step(self, number: int) -> None:
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(number)).to(self.dtype)
        self.optimizer.zero_grad()
        (self.model(x) - x[:, :8]).square().mean().backward()
        self.optimizer.step()

    def check(self) -> None:
        shares = self.sparsity.shares(self.sparsity.target_sparsity)
        for name, parameter in self.sparsity.parameters.items():
            mask, structure = parameter.mask, parameter.pattern.structure
            assert int(mask.sum()) == parameter.pattern.kept(mask.shape, shares[name])
            assert structure.holds(mask, shares[name])
            weight = parameter.true_weight()
            assert weight.dtype == self.dtype and bool(weight.isfinite().all())
            assert not weight[~mask].any()
        assert_exact_zeros(self.sparsity, self.optimizer)

    def state(self) -> list[Any]:
        parts = (self.model, self.sparsity, self.optimizer)
        return [copy.deepcopy(part.state_dict()) for part in parts]

    def load(self, state: list[Any]) -> None:
        for part, saved in zip((self.model, self.sparsity, self.optimizer), state, strict=True):
            part.load_state_dict(saved)


WORKING = [
    (method, key)
    for method in ALGORITHMS
    for key in MATRIX.PATTERNS
    if takes_pattern(method, MATRIX.PATTERNS[key])
]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(WORKING),
    st.sampled_from(list(DISTRIBUTIONS)),
    st.sampled_from(MATRIX.STORAGES),
    st.sampled_from(DTYPES),
    st.integers(0, 99),
    st.integers(1, 5),
)
def test_masks_obey_and_runs_resume_bit_for_bit(pair, distribution, compute, dtype, seed, stops_after):
    method, key = pair
    # What does not go together is on the page; it goes on with what does.
    distribution = distribution if works(method, key, distribution, compute) else "uniform"
    chosen = options(method, key, distribution, compute, seed)
    training, again = (Training(method, copy.deepcopy(chosen), dtype) for _ in range(2))
    training.check()
    saved: list[Any] = []
    for number in range(6):
        training.step(number)
        training.check()
        if number + 1 == stops_after:
            saved = training.state()
    again.load(saved)
    for number in range(stops_after, 6):
        again.step(number)
    assert_identical(snapshot(training.model, training.optimizer), snapshot(again.model, again.optimizer))
