"""Runs that are the same in one process and, cut by `fully_shard`, in several."""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import rarefy

STEPS = 2
# Rows that two and four processes cannot share out evenly, and fewer rows than processes.
SIZES = (12, 14, 8, 3)
LARGE = ["0.weight", "2.weight"]
GROWING = {"type": "polynomial", "init": 0.2, "final": 0.8, "start": 0, "stop": 4}


class Mixed(rarefy.DynamicSparsityAlgorithm):
    """An algorithm of one's own: ranks by an average of gradients, and lets forward passes use a part."""

    needs = "active"
    connection_state: ClassVar = {"seen": 1.0}

    def observe(self, view):
        view.state["seen"].mul_(0.5).add_(view.gradient.abs())

    def update_mask(self, view):
        scores = view.weight.abs() * view.state["seen"] + view.gradient.abs()
        random = torch.rand(scores.shape, generator=self.generator, dtype=scores.dtype)
        return self.keep_top(torch.where(view.mask, scores + 1, random), view.sparsity)

    def forward_mask(self, view):
        largest = view.weight.abs() >= view.weight[view.mask].abs().median()
        return view.mask & largest


@dataclass(frozen=True)
class Case:
    """A short training run.

    Args:
        options: of the sparsity block.
        micro_batches: backward passes before each step.
        is_tied: whether all weights have the same size at first, so that everything ties.
        optimizer: its name in `torch.optim`.
        clip: a norm for gradients, or 0.
    """

    options: dict[str, Any]
    micro_batches: int = 1
    is_tied: bool = False
    optimizer: str = "AdamW"
    clip: float = 0.0


RIGL = {"algorithm": "rigl", "sparsity": 0.6, "drop_fraction": 0.5}
GLOBAL = {"algorithm": "gmp", "sparsity": GROWING, "distribution": "global"}
TRANSPOSABLE = {"n": 1, "m": 2, "transposable": True}
CASES = {
    "static": Case({"algorithm": "static", "sparsity": 0.5}, optimizer="SGD"),
    "gmp": Case({"algorithm": "gmp", "sparsity": GROWING, "init_method": "topk"}),
    "gmp tied": Case({"algorithm": "gmp", "sparsity": GROWING}, is_tied=True),
    "set": Case({"algorithm": "set", "sparsity": 0.6, "drop_fraction": 0.5}, micro_batches=2),
    "rigl erk": Case({**RIGL, "distribution": "erk"}, optimizer="Adamax"),
    "rigl twice": Case(RIGL, micro_batches=2, clip=0.1),
    "rigl tied": Case({**RIGL, "seed": 3}, is_tied=True),
    "mest": Case({"algorithm": "mest", "sparsity": 0.5, "drop_fraction": 0.5, "init_method": "topk"}),
    "mest groups": Case({"algorithm": "mest", "sparsity": 0.5, "drop_fraction": 0.5, "balance_in_groups": 2}),
    "movement": Case({"algorithm": "movement", "sparsity": GROWING}, micro_batches=2),
    "top-kast": Case({"algorithm": "top_kast", "sparsity": 0.4, "forward_sparsity": 0.7}),
    "ac/dc": Case({"algorithm": "ac_dc", "sparsity": 0.6, "update": {"steps": [0, 1, 2]}}),
    "granet": Case({"algorithm": "granet", "sparsity": GROWING, "drop_fraction": 0.5}, micro_batches=2),
    "srigl": Case({"algorithm": "srigl", "sparsity": 0.6, "drop_fraction": 0.5, "min_salient": 0.3}),
    "fan in": Case({**RIGL, "pattern": "fan_in"}),
    "fan out": Case({**RIGL, "pattern": "fan_out"}),
    "diagonals": Case({**RIGL, "pattern": "diagonal"}),
    "rows": Case({**RIGL, "sparsity": 0.85, "keep_rows": True}),
    "transposable": Case(
        {**RIGL, "sparsity": 0.5, "drop_fraction": 1.0, "pattern": TRANSPOSABLE, "param_filter": LARGE}
    ),
    "global": Case({**GLOBAL, "init_method": "topk"}),
    "global tied": Case({**GLOBAL, "param_filter": LARGE}, is_tied=True),
    "global blocks": Case(
        {**GLOBAL, "init_method": "topk", "pattern": {"block": [2, 2]}, "param_filter": LARGE}
    ),
    "global movement": Case({**GLOBAL, "algorithm": "movement", "param_filter": LARGE}),
    "checkerboard": Case({"algorithm": "set", "sparsity": 0.5, "init_method": "checkerboard"}),
    "n of m": Case({**RIGL, "sparsity": 0.5, "drop_fraction": 1.0, "pattern": {"n": 1, "m": 2}}),
    "blocks": Case({**RIGL, "pattern": {"block": [2, 2]}, "param_filter": LARGE}),
    "groups in": Case({**RIGL, "balance_in_groups": 2}),
    "groups out": Case({**RIGL, "balance_out_groups": 2, "param_filter": LARGE}),
    "own": Case({"algorithm": "sharded_runs:Mixed", "sparsity": 0.5}),
    "powerprop": Case({"algorithm": "powerprop", "sparsity": GROWING, "alpha": 3}, clip=0.1),
}


def build(is_tied: bool = False) -> nn.Sequential:
    """Three layers in float64."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for sizes in itertools.pairwise(SIZES):
        layers += [nn.Linear(*sizes), nn.Tanh()]
    model = nn.Sequential(*layers).double()
    if is_tied:
        with torch.no_grad():
            for weight in model.parameters():
                weight.copy_(weight.sign() * 0.25)
    return model


def batch(step: int, rank: int, ranks: int) -> Tensor:
    """This rank's part of the batch of a step."""
    rows = torch.randn(8, SIZES[0], generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return rows.chunk(ranks)[rank]


def cut(model: nn.Sequential, mesh: Any = None) -> None:
    """A layer by itself, and the rest of the model."""
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Any) -> Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Run:
    """A case in progress; `order` tells when `fully_shard` is called, before or after `sparsity.apply(model)`."""

    def __init__(self, case: Case, order: str = "", place: tuple[int, int] = (0, 1), mesh: Any = None):
        self.case = case
        self.place = place
        self.model = build(case.is_tied)
        self.sparsity = rarefy.configure(case.options)
        if order == "before":
            cut(self.model, mesh)
        with warnings.catch_warnings(action="ignore"):
            self.sparsity.apply(self.model)
        if order == "after":
            cut(self.model, mesh)
        self.optimizer = getattr(torch.optim, case.optimizer)(self.model.parameters(), lr=0.05)
        self.sparsity.apply(self.optimizer)
        self.count = 0
        self.masks = [self.present_masks()]
        self.losses: list[float] = []

    def present_masks(self) -> dict[str, Tensor]:
        state = self.model.state_dict()
        return {name: whole(mask) for name, mask in state.items() if name.endswith("_mask")}

    def step(self) -> None:
        pieces = self.case.micro_batches
        self.optimizer.zero_grad()
        for piece in range(pieces):
            loss = self.model(batch(10 * self.count + piece, *self.place)).square().mean() / pieces
            loss.backward()
        if self.case.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.case.clip)
        self.optimizer.step()
        self.count += 1
        self.masks.append(self.present_masks())

    def go(self, steps: int = STEPS) -> dict[str, Any]:
        """The masks after each step, and the weights and optimizer states at the end."""
        for _ in range(steps):
            self.step()
        states = {
            f"{index}.{key}": whole(tensor)
            for index, state in enumerate(self.optimizer.state.values())
            for key, tensor in state.items()
            if isinstance(tensor, Tensor)
        }
        weights = {name: whole(t) for name, t in self.model.state_dict().items() if "mask" not in name}
        return {"masks": self.masks, "tensors": {**weights, **states}}
