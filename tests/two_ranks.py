"""One small run, in a single process or in two: what a test of processes trains and compares."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import rarefy
from rarefy.distributed import whole

STEPS, BATCH, WIDTH, RATE = 10, 8, 16, 1e-2
RIGL: dict[str, Any] = {"algorithm": "rigl", "sparsity": 0.75, "seed": 3, "update": {"freq": 3, "stop": 10}}
Found = dict[str, Tensor]
EVERY_STATE = 2 * 2 * (WIDTH * WIDTH * 3 // 4)
"""Numbers off the masks that AdamW has for both weights."""


class Net(nn.Module):
    """Two layers in float64, so that the sums of other processes round far below any two scores."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)).double()
        drawn = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in self.parameters():
                weight.copy_(torch.randn(weight.shape, generator=drawn, dtype=torch.float64) / 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.layers(x) - 1).square().mean()}


def rows() -> Tensor:
    drawn = torch.Generator().manual_seed(2)
    return torch.randn(STEPS * BATCH, WIDTH, generator=drawn, dtype=torch.float64)


def own_batches(rank: int, ranks: int) -> list[Tensor]:
    return [batch.chunk(ranks)[rank] for batch in rows().split(BATCH)]


def adamw(model: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0)


def train(network: nn.Module, optimizer: torch.optim.Optimizer, batches: list[Tensor]) -> None:
    for batch in batches:
        optimizer.zero_grad()
        network(batch)["loss"].backward()
        optimizer.step()


def result(sparsity: Any, optimizer: Any) -> Found:
    """Weights and masks; and for each sparse weight with a state in this process, its values off the mask."""
    found = {}
    states = optimizer.state
    for name, one in sparsity.parameters.items():
        found[f"{name} weight"] = one.true_weight().clone()
        found[f"{name} mask"] = one.mask.clone()
        state = states.get(one.weight, {})
        moments = [whole(state[key]) for key in ("exp_avg", "exp_avg_sq") if key in state]
        off = [moment[~one.mask] if moment.shape == one.mask.shape else moment[:0] for moment in moments]
        found[f"{name} off"] = torch.cat(off) if off else torch.zeros(0)
    return found


def plain() -> Found:
    """The whole batches in a single process."""
    model = Net()
    optimizer = adamw(model)
    sparsity = rarefy.configure(RIGL)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    train(model, optimizer, own_batches(0, 1))
    return result(sparsity, optimizer)


def assert_same(found: Found) -> None:
    """The masks of a single process with the whole batches, and its weights up to rounding."""
    alone = plain()
    assert set(found) == set(alone)
    for name, value in alone.items():
        if name.endswith("mask"):
            assert torch.equal(found[name], value)
        elif name.endswith("weight"):
            torch.testing.assert_close(found[name], value)


def assert_zeros(found: Found) -> int:
    """Weights and states off the masks are exact zeros; how many numbers of states there are."""
    names = [name.removesuffix(" mask") for name in found if name.endswith(" mask")]
    assert len(names) == 2
    for name in names:
        mask = found[f"{name} mask"]
        assert int(mask.sum()) == WIDTH * WIDTH // 4
        assert not found[f"{name} weight"][~mask].any()
        assert not found[f"{name} off"].any()
    return sum(found[f"{name} off"].numel() for name in names)
