"""Every method × pattern × dtype that is not refused, in both storages side by side; in float32 each distribution.

The layers are given the identity and are not fed to each other, so that no sum of their products has more than one
term that is not zero. Nothing rounds in one storage that does not in the other: weights, masks and optimizer states are
the same bits in every dtype, or something is wrong.
"""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from contract_rows import ROWS, takes
from helpers import assert_exact_zeros
from matrix_page import MATRIX, options, works
from rarefy.distributions import DISTRIBUTIONS
from rarefy.methods.registry import ALGORITHMS

STEPS = 3
# Sides that blocks of 8, tiles of 4 and two groups of either divide; no two combinations need have the same.
SIDES = (16, 32, 48)
BALANCES = ("", "balance_in_groups", "balance_out_groups")
DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


class Apart(nn.Module):
    """Layers that are trained towards matrices of their own."""

    def __init__(self, shapes: list[tuple[int, int]], dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(*shape, bias=False, dtype=dtype) for shape in shapes)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.normal_(layer.weight, generator=draw)

    def losses(self, step: int) -> Tensor:
        total = torch.zeros(())
        for number, layer in enumerate(self.layers):
            assert isinstance(layer, nn.Linear)
            found = layer(torch.eye(layer.in_features, dtype=layer.weight.dtype))
            draw = torch.Generator().manual_seed(100 * number + step)
            total = total + (found - torch.randn(found.shape, generator=draw).to(found.dtype)).square().sum()
        return total


class Run:
    """A model, its algorithm and its optimizer."""

    def __init__(self, method: str, chosen: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
        # Which of all shapes and optimizers, follows from the seed.
        shapes = [(SIDES[seed // 3**place % 3], SIDES[seed // 3 ** (place + 1) % 3]) for place in (0, 2)]
        if chosen["distribution"] == "global":
            # Or all diagonals and blocks of a small layer would lose against a large one.
            shapes = shapes[:1] * 2
        self.model = Apart(shapes, dtype, seed)
        self.sparsity = ALGORITHMS[method](**chosen)
        self.sparsity.apply(self.model)
        if seed % 2 and dtype != torch.float16:  # in which Adam's epsilon is zero
            self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.02)
        else:
            # Powers of two, as torch rounds products in float16 where a vector ends, and nowhere else.
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=2**-5, momentum=0.5)
        self.sparsity.apply(self.optimizer)

    def step(self, number: int) -> None:
        self.optimizer.zero_grad()
        self.model.losses(number).backward()
        self.optimizer.step()

    def check(self) -> None:
        """Counts, patterns and zeros."""
        shares = self.sparsity.shares(self.sparsity.target_sparsity)
        for name, parameter in self.sparsity.parameters.items():
            mask = parameter.mask
            pattern = parameter.pattern
            assert int(mask.sum()) == pattern.kept(mask.shape, shares[name]), name
            assert all(pattern.structure.holds(piece, shares[name]) for piece in pattern.split(mask)), name
            weight = parameter.true_weight()
            assert bool(weight.isfinite().all()) and not weight[~mask].any(), name
        assert_exact_zeros(self.sparsity, self.optimizer)

    def state(self) -> dict[str, Tensor]:
        """Everything, in dense form."""
        found = {}
        for name, parameter in self.sparsity.parameters.items():
            found[f"{name} mask"] = parameter.mask.clone()
            found[name] = parameter.true_weight().clone()
            found |= {
                f"{name} {key}": value.detach().to_dense().clone()
                for key, value in self.optimizer.state.get(parameter.weight, {}).items()
                if isinstance(value, Tensor)
            }
        return found


def combinations(method: str, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Patterns and distributions that are not refused; in float32 all, in other dtypes one distribution a pattern."""
    found = []
    for key in MATRIX.PATTERNS:
        working = [one for one in DISTRIBUTIONS if works(method, key, one)]
        if dtype != torch.float32:
            # Another one for each dtype: a distribution sees counts alone, which have no dtype.
            turn = zlib.crc32(f"{method} {key}".encode()) + DTYPES.index(dtype)
            working = [working[turn % len(working)]] if working else []
        found += [(key, one) for one in working]
    return found


def chosen_for(method: str, key: str, distribution: str, compute: str, seed: int) -> dict[str, Any]:
    found = options(method, key, distribution, compute, seed)
    balance = BALANCES[seed % 3]
    if balance:
        found[balance] = 2
    if takes(method, "update"):
        found["update"] = {"steps": [1, 2, 3]} if method == "ac_dc" else {"freq": 1}
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("method", ALGORITHMS)
def test_both_storages_keep_every_promise_and_hold_the_same_bits(method: str, dtype: torch.dtype) -> None:
    moves = False
    for key, distribution in combinations(method, dtype):
        seed = zlib.crc32(f"{method} {key} {distribution} {dtype}".encode())
        what = f"{method}, {key}, {distribution}, {dtype}, seed {seed}"
        runs = [
            Run(method, chosen_for(method, key, distribution, compute, seed), dtype, seed)
            for compute in MATRIX.STORAGES
        ]
        masks = follow(runs, what)
        moves = moves or any(not torch.equal(one, masks[0]) for one in masks)
    # Of few blocks the same may win again.
    assert moves == ROWS[method].moves


def follow(runs: list[Run], what: str) -> list[Tensor]:
    """Trains both and compares them at each step; the masks of each, as one vector."""
    masks = []
    for number in range(STEPS + 1):
        if number:
            for run in runs:
                run.step(number)
        for run in runs:
            run.check()
        masked, compact = (run.state() for run in runs)
        assert masked.keys() == compact.keys(), what
        for name, value in masked.items():
            assert torch.equal(value, compact[name]), f"{what}: {name} after step {number}"
        masks.append(torch.cat([value.flatten() for name, value in masked.items() if name.endswith(" mask")]))
    return masks
