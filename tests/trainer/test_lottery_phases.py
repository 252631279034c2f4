"""Iterative magnitude pruning with rewinding as a list of trainers: to the last bit the loop by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.checkpoint.directory import load
from rarefy.errors import ConfigError, RarefyError

SHARES = (0.0, 0.5, 0.75, 0.875)
STEPS, REWIND_TO = 6, 2
WEIGHTS = ("body.weight", "head.weight")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.head(torch.relu(self.body(x))) - x[:, :4].sin()).square().mean()


def data() -> list[torch.Tensor]:
    return list(torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0)))


def first() -> Net:
    torch.manual_seed(3)
    return Net()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.02)


def in_phases(folder: Path, compute: str, scope: str) -> list[dict[str, torch.Tensor]]:
    """What each round ends with, as the list of trainers of examples/lottery_ticket.yaml."""
    ends = []
    for number, share in enumerate(SHARES):
        ticket = {"name": "topk_of", "checkpoint": str(folder / str(number - 1)), "scope": scope}
        block = {"algorithm": "static", "sparsity": share, "compute": compute, "init_method": ticket}
        trainer = rarefy.Trainer(
            model_dir=folder / str(number),
            model=first,
            device="cpu",
            optimizer=adamw,
            precision={"enabled": False},
            sparsity=block if number else None,
            loop={"num_steps": STEPS, "eval_frequency": 0},
            checkpoint={"steps": REWIND_TO},
            loggers=[],
            seed=2,
        )
        start = folder / "0" / f"checkpoint_{REWIND_TO}" if number else None
        trainer.fit(data(), ckpt_path=start, load_states="model" if number else "all")
        newest = max((folder / str(number)).glob("checkpoint_*"), key=lambda one: int(one.name[11:]))
        ends.append(load(newest).model)
    return ends


def by_hand(scope: str) -> list[dict[str, torch.Tensor]]:
    """The same with dense tensors and masks in a plain loop."""
    masks = {name: torch.ones_like(first().get_parameter(name), dtype=torch.bool) for name in WEIGHTS}
    early: dict[str, torch.Tensor] = {}
    ends = []
    for share in SHARES:
        model = first()
        if early:
            model.load_state_dict(early)
        optimizer = adamw(model)
        weights = {name: model.get_parameter(name) for name in WEIGHTS}
        for name, weight in weights.items():
            weight.data[~masks[name]] = 0
        for step in range(STEPS):
            optimizer.zero_grad()
            model(data()[step % 4]).backward()
            for name, weight in weights.items():
                assert weight.grad is not None
                weight.grad[~masks[name]] = 0
            optimizer.step()
            if not early and step + 1 == REWIND_TO:
                early = {name: value.clone() for name, value in model.state_dict().items()}
        ends.append({name: value.clone() for name, value in model.state_dict().items()})
        ends[-1] |= {f"{name}_mask": mask for name, mask in masks.items() if share}
        following = SHARES[min(SHARES.index(share) + 1, len(SHARES) - 1)]
        masks = largest({name: weight.detach().abs() for name, weight in weights.items()}, following, scope)
    return ends


def largest(sizes: dict[str, torch.Tensor], share: float, scope: str) -> dict[str, torch.Tensor]:
    groups = [list(sizes)] if scope == "global" else [[name] for name in sizes]
    masks = {}
    for group in groups:
        whole = torch.cat([sizes[name].flatten() for name in group])
        threshold = whole.sort(descending=True).values[round((1 - share) * len(whole)) - 1]
        masks |= {name: sizes[name] >= threshold for name in group}
    return masks


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_rounds_are_the_loop_by_hand(tmp_path, compute, scope):
    found = in_phases(tmp_path, compute, scope)
    for number, (one, expected) in enumerate(zip(found, by_hand(scope), strict=True)):
        for name in expected:
            if compute == "masked" or name.endswith("mask"):
                assert torch.equal(one[name], expected[name]), (number, name)
            else:
                # The kernels add in another order.
                torch.testing.assert_close(one[name], expected[name], rtol=1e-4, atol=1e-6)
        if number:
            kept = sum(int(one[f"{name}_mask"].sum()) for name in WEIGHTS)
            assert kept == round((1 - SHARES[number]) * 192)


def saved(path: Path, **changes: Any) -> Path:
    model = first()
    rarefy.Static(0.5, init_method="topk").apply(model)
    torch.save({**model.state_dict(), **changes}, path)
    return path


def ticket(path: Path, sparsity: float = 0.75, **options: Any) -> None:
    method = {"name": "topk_of", "checkpoint": path, **options}
    rarefy.Static(sparsity, init_method=method).apply(first())


@pytest.mark.parametrize(
    ("changes", "sparsity", "message"),
    [
        (
            {"body.weight": torch.ones(2, 2), "body.weight_mask": torch.ones(2, 2, dtype=torch.bool)},
            0.75,
            r"init_method topk_of: .*late.pt has body.weight \[2, 2\], not \[16, 8\]; give a checkpoint of the",
        ),
        ({}, 0.25, r"body.weight would have 96 connections, and .*late.pt has 64 of them; give a higher"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, changes, sparsity, message):
    path = saved(tmp_path / "late.pt", **changes)
    with pytest.raises(RarefyError, match=message):
        ticket(path, sparsity)


def test_a_file_of_another_model_or_none_is_refused(tmp_path):
    torch.save({"other.weight": torch.ones(2, 2)}, tmp_path / "other.pt")
    with pytest.raises(
        RarefyError, match=r"other\.pt has no body\.weight; give a checkpoint of the same model"
    ):
        ticket(tmp_path / "other.pt")
    with pytest.raises(RarefyError, match="does not exist"):
        ticket(tmp_path / "none")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "rows"}, "init_method.scope: 'rows' is not allowed; give global or layer"),
        ({"batches": 2}, "init_method: the key 'batches' is not allowed; give a known key"),
    ],
)
def test_its_keys(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        ticket(saved(tmp_path / "late.pt"), **options)


@pytest.mark.parametrize("block", ["sparsegpt", {"name": "SparseGPT", "batches": 4}])
def test_sparsegpt_says_where_it_is(block):
    with pytest.raises(
        ConfigError, match="sparsegpt changes the weights as well: run `rarefy prune --method"
    ):
        rarefy.Static(0.5, init_method=block)
