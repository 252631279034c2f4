"""The example methods, as users would write them: against naive loops, in both storages, resumed to the last bit."""

from __future__ import annotations

import copy
import re
import runpy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from example_files import EXAMPLES
from helpers import assert_identical, snapshot
from rarefy.algorithms.base import Sparsifier
from rarefy.initializers import generator_for, random_scores
from rarefy.masks import drop_lowest, grow_highest, keep_top, kept_count

CUBIC = {"type": "polynomial", "init": 0, "final": 0.8, "start": 0, "stop": 24}
OPTIONS: dict[str, dict[str, Any]] = {
    "movement": {"sparsity": CUBIC, "update": {"freq": 2}},
    "mest": {"sparsity": 0.75, "drop_fraction": 0.4, "update": {"freq": 2}, "gradient_share": 0.5},
    "top_kast": {"sparsity": 0.5, "forward_sparsity": 0.75, "update": {"freq": 2}},
}
CLASSES = {"movement": "Movement", "mest": "MEST", "top_kast": "TopKAST"}
LINES = {"movement": 30, "mest": 30, "top_kast": 40}
SEED, RATE, STEPS = 3, 0.05, 48
every_method = pytest.mark.parametrize("name", OPTIONS)
both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


def method(name: str, **changes: Any) -> Any:
    kind = runpy.run_path(str(EXAMPLES / "methods" / f"{name}.py"))[CLASSES[name]]
    return kind(**{**OPTIONS[name], "seed": SEED, **changes})


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def loss_of(model: Any, step: int) -> Tensor:
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x[:, :8].sin()).square().mean()


class Run:
    """A model that is trained by a method."""

    def __init__(
        self, name: str, compute: str, optimizer: Any = torch.optim.SGD, seed: int = 0, **changes: Any
    ):
        self.model = network(seed)
        self.optimizer = optimizer(self.model.parameters(), lr=RATE)
        self.sparsity: Sparsifier = method(name, compute=compute, **changes)
        self.sparsity.apply(self.model)
        self.sparsity.apply(self.optimizer)

    def train(self, steps: range) -> list[float]:
        losses = []
        for step in steps:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, step)
            loss.backward()
            self.optimizer.step()
            losses.append(loss.item())
        return losses

    def trained(self, name: str) -> Tensor:
        """A weight as the optimizer sees it."""
        return self.sparsity.algorithms[0].parameters[name].true_weight()

    def states(self) -> tuple[Any, ...]:
        return copy.deepcopy(
            (self.model.state_dict(), self.sparsity.state_dict(), self.optimizer.state_dict())
        )

    def load(self, states: tuple[Any, ...]) -> None:
        for target, state in zip((self.model, self.sparsity, self.optimizer), states, strict=True):
            target.load_state_dict(state)


@every_method
def test_a_method_is_short(name):
    code = (EXAMPLES / "methods" / f"{name}.py").read_text().splitlines()
    assert len([line for line in code if line.strip()]) <= LINES[name]
    assert not any(re.search(r"\b_[a-z]", line) for line in code)


@every_method
@both_storages
@pytest.mark.parametrize("stop", [3, 4])
def test_resume_is_bit_identical(name, compute, stop):
    run = Run(name, compute, torch.optim.AdamW)
    run.train(range(stop))
    states = run.states()
    losses = run.train(range(stop, 12))
    again = Run(name, compute, torch.optim.AdamW, seed=5)
    again.load(states)
    assert again.train(range(stop, 12)) == losses
    assert_identical(snapshot(run.model, run.optimizer), snapshot(again.model, again.optimizer))


@every_method
def test_both_storages_agree(name):
    runs = {compute: Run(name, compute) for compute in ("masked", "compact")}
    losses = [torch.tensor(run.train(range(20)), dtype=torch.float64) for run in runs.values()]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-9, atol=0)
    masks = [
        {key: value for key, value in run.model.state_dict().items() if key.endswith("mask")}
        for run in runs.values()
    ]
    assert_identical(*masks)


@every_method
@pytest.mark.parametrize("first", ["masked", "compact"])
def test_a_run_goes_on_in_the_other_storage(name, first):
    """What is saved does not depend on the storage, and a change of storage in between loses nothing."""
    plain = Run(name, first)
    expected = plain.train(range(12))
    moved = Run(name, first)
    losses = moved.train(range(5))
    other = "compact" if first == "masked" else "masked"
    for parameter in moved.sparsity.algorithms[0].parameters.values():
        parameter.become(other, [moved.optimizer])
    losses += moved.train(range(5, 12))
    assert losses == pytest.approx(expected, rel=1e-9)
    loaded = Run(name, other, seed=7)
    before = Run(name, first)
    before.train(range(5))
    loaded.load(before.states())
    assert loaded.train(range(5, 12)) == pytest.approx(expected[5:], rel=1e-9)


# ---- naive loops: dense tensors, everything recomputed, nothing of the library but its pure functions ----


class Naive:
    """The weights of the network with masks beside them, trained by plain SGD."""

    def __init__(self, run: Run) -> None:
        layers = run.model[0], run.model[2]
        self.biases = [layer.bias.detach().clone() for layer in layers]
        states = run.model.state_dict()
        self.weights = [run.trained(f"{index}.weight") for index in (0, 2)]
        self.masks = [states[f"{index}.weight_mask"].clone() for index in (0, 2)]
        self.forward = [mask.clone() for mask in self.masks]
        self.scores = [torch.zeros_like(weight) for weight in self.weights]
        self.updates = 1

    def __call__(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(x @ self.used[0].T + self.leaves[0])
        return hidden @ self.used[1].T + self.leaves[1]

    def step(self, number: int) -> list[Tensor]:
        self.used = [
            torch.where(mask, weight, 0).requires_grad_()
            for mask, weight in zip(self.forward, self.weights, strict=True)
        ]
        self.leaves = [bias.clone().requires_grad_() for bias in self.biases]
        grads = torch.autograd.grad(loss_of(self, number), [*self.used, *self.leaves])
        gradients = [torch.where(mask, grad, 0) for mask, grad in zip(self.masks, grads[:2], strict=True)]
        for index in range(2):
            self.scores[index] -= self.weights[index] * gradients[index]
            self.weights[index] = self.weights[index] - RATE * gradients[index]
            self.biases[index] = self.biases[index] - RATE * grads[2 + index]
        return gradients

    def take(self, index: int, mask: Tensor) -> None:
        """A new topology: new connections start at zero."""
        is_old = mask & self.masks[index]
        self.weights[index] = torch.where(is_old, self.weights[index], 0)
        self.scores[index] = torch.where(is_old, self.scores[index], 0)
        self.masks[index] = mask
        self.forward[index] = mask


def movement_mask(
    naive: Naive, index: int, step: int, gradient: Tensor, generator: torch.Generator
) -> Tensor:
    sparsity = 0.8 * (1 - (1 - min(step, 24) / 24) ** 3)
    scores = naive.scores[index].masked_fill(~naive.masks[index], -torch.inf)
    return keep_top(scores, kept_count(scores.numel(), sparsity))


def mest_mask(naive: Naive, index: int, step: int, gradient: Tensor, generator: torch.Generator) -> Tensor:
    mask, weight = naive.masks[index], naive.weights[index]
    dropped = round(0.4 * int(mask.sum()))
    kept = drop_lowest(mask, weight.abs() + 0.5 * gradient.abs(), dropped)
    return grow_highest(kept, random_scores(weight, generator), dropped)


def top_kast_mask(
    naive: Naive, index: int, step: int, gradient: Tensor, generator: torch.Generator
) -> Tensor:
    weight, mask = naive.weights[index], naive.masks[index]
    strongest = strongest_quarter(weight, mask)
    scores = torch.rand(weight.shape, generator=generator)
    return keep_top(scores.masked_fill(strongest, 2.0), weight.numel() // 2)


def strongest_quarter(weight: Tensor, mask: Tensor) -> Tensor:
    return keep_top(weight.abs().masked_fill(~mask, -1.0), weight.numel() // 4)


@pytest.mark.parametrize(
    ("name", "rule"), [("movement", movement_mask), ("mest", mest_mask), ("top_kast", top_kast_mask)]
)
@both_storages
def test_a_method_is_its_naive_loop(name, rule, compute):
    run = Run(name, compute)
    naive = Naive(run)
    if name == "top_kast":
        naive.forward = list(map(strongest_quarter, naive.weights, naive.masks))
    moved = 0
    for step in range(STEPS):
        run.train(range(step, step + 1))
        gradients = naive.step(step)
        if (step + 1) % 2 == 0:
            for index, key in enumerate(("0.weight", "2.weight")):
                generator = generator_for(SEED, key, naive.updates)
                mask = rule(naive, index, step + 1, gradients[index], generator)
                moved += int((mask != naive.masks[index]).sum())
                naive.take(index, mask)
                if name == "top_kast":
                    naive.forward[index] = strongest_quarter(naive.weights[index], mask)
            naive.updates += 1
        states = run.model.state_dict()
        for index, key in enumerate(("0.weight", "2.weight")):
            assert torch.equal(states[f"{key}_mask"], naive.masks[index]), f"step {step}: {key}"
            torch.testing.assert_close(run.trained(key), naive.weights[index], rtol=1e-9, atol=1e-12)
            expected = torch.where(naive.forward[index], naive.weights[index], 0)
            for used in (states[key], run.model.get_parameter(key).detach()):
                torch.testing.assert_close(used.to_dense(), expected, rtol=1e-9, atol=1e-12)
    assert moved > 100
