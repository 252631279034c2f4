"""SparseGPT against the formula of optimal brain surgeons, one input at a time, and against rivals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.errors import RarefyError
from rarefy.masks import keep_top, keep_top_in_rows, kept_count
from rarefy.patterns.structures import Blocks, NOfM
from rarefy.patterns.transposable import Transposable
from rarefy.saliency.sparse_gpt import sparse_gpt


def layer(rows: int, columns: int, seed: int, samples: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator, dtype=torch.float64)
    inputs = torch.randn(samples, columns, generator=generator, dtype=torch.float64) @ mixing
    return torch.randn(rows, columns, generator=generator, dtype=torch.float64), inputs


def naive(weight, hessian, sparsity, block, m=None):
    """Column by column; the inverse of what is left is computed anew each time."""
    w = weight.clone()
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=w.dtype)
    rows, columns = w.shape
    mask = torch.ones(rows, columns, dtype=torch.bool)

    def first(j):
        return torch.linalg.inv(damped[j:, j:])[0]

    for j in range(columns):
        size = m or block
        if j % size == 0:
            stop = min(j + size, columns)
            cost = torch.stack([w[:, i] ** 2 / first(i)[0] for i in range(j, stop)], 1)
            if m:
                mask[:, j:stop] = keep_top_in_rows(cost, kept_count(m, sparsity))
            else:
                count = kept_count(rows * stop, sparsity) - kept_count(rows * j, sparsity)
                mask[:, j:stop] = keep_top(cost, count)
        inverse = first(j)
        for row in range(rows):
            if not mask[row, j]:
                w[row, j:] -= w[row, j] / inverse[0] * inverse
                w[row, j] = 0
    return w, mask


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 12),
    block=st.integers(1, 14),
    sparsity=st.floats(0, 1),
    seed=st.integers(0, 99),
)
def test_the_formula(rows, columns, block, sparsity, seed):
    weight, inputs = layer(rows, columns, seed)
    hessian = inputs.t() @ inputs
    found, mask = sparse_gpt(weight, hessian, sparsity, block=block)
    expected, expected_mask = naive(weight, hessian, sparsity, block)
    assert torch.equal(mask, expected_mask) and int(mask.sum()) == kept_count(weight.numel(), sparsity)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    assert not found[~mask].any()


@pytest.mark.parametrize(("n", "m", "block"), [(2, 4, 128), (2, 4, 6), (1, 3, 4), (1, 2, 1)])
def test_n_of_m(n, m, block):
    weight, inputs = layer(4, 12, 0)
    hessian = inputs.t() @ inputs
    found, mask = sparse_gpt(weight, hessian, 1 - n / m, NOfM(n, m), block=block)
    expected, expected_mask = naive(weight, hessian, 1 - n / m, block, m)
    assert torch.equal(mask, expected_mask)
    assert (mask.view(-1, m).sum(1) == n).all()
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_n_of_m_in_both_directions():
    weight, inputs = layer(8, 12, 0)
    found, mask = sparse_gpt(weight, inputs.t() @ inputs, 0.5, Transposable(2, 4))
    tiles = mask.view(2, 4, 3, 4)
    assert (tiles.sum(1) == 2).all() and (tiles.sum(3) == 2).all() and not found[~mask].any()


def test_both_ways():
    weight, inputs = layer(8, 12, 0)
    structure = Transposable(2, 4)
    found, mask = sparse_gpt(weight, inputs.t() @ inputs, 0.5, structure)
    assert structure.holds(mask, 0.5) and int(mask.sum()) == 48 and not found[~mask].any()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_less_error_than_magnitude_and_wanda(seed, sparsity):
    """Not for every matrix, but for layers of some width whose inputs have something in common."""
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(16, 256, generator=generator)
    inputs = torch.randn(600, 16, generator=generator) @ common + torch.randn(600, 256, generator=generator)
    weight = torch.randn(32, 256, generator=generator)
    hessian = inputs.t() @ inputs

    def error(pruned):
        return float(((weight - pruned) @ inputs.t()).square().sum())

    found, _ = sparse_gpt(weight, hessian, sparsity)
    magnitude = weight * keep_top(weight.abs(), kept_count(weight.numel(), sparsity))
    wanda = weight * keep_top_in_rows(weight.abs() * inputs.norm(dim=0), kept_count(256, sparsity))
    assert error(found) < 0.5 * error(magnitude) and error(found) < 0.5 * error(wanda)


def test_inputs_that_are_always_zero():
    weight, inputs = layer(3, 6, 0)
    inputs[:, 2] = 0
    before = weight.clone()
    found, mask = sparse_gpt(weight, inputs.t() @ inputs, 0.5)
    assert torch.equal(weight, before) and not found[:, 2].any() and found.isfinite().all()
    assert not mask[:, 2].any()
    nothing, _ = sparse_gpt(weight, torch.zeros(6, 6), 0.5)
    assert not nothing.any()


def test_few_samples_are_dampened():
    weight, inputs = layer(3, 40, 0, samples=2)
    found, mask = sparse_gpt(weight.float(), (inputs.t() @ inputs).float(), 0.5, block=16)
    assert found.isfinite().all() and found.dtype == torch.float32 and int(mask.sum()) == 60


def test_other_structures_and_broken_hessians():
    with pytest.raises(
        RarefyError, match=r"sparsegpt cannot prune by the pattern \{block: \[2, 2\]\}; give unstruct"
    ):
        sparse_gpt(torch.ones(4, 4), torch.eye(4), 0.5, Blocks(2, 2))
    with pytest.raises(
        RarefyError, match=r"sparsegpt cannot factorize the Hessian \(.*\); give more batches, or wanda"
    ):
        sparse_gpt(torch.ones(2, 2), torch.tensor([[1.0, 5.0], [5.0, 1.0]]), 0.5)
