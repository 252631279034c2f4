"""Powerpropagation: what the optimizer trains, and that nobody else sees it."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import ConfigError, RarefyError
from rarefy.methods.powerprop import Powerprop
from rarefy.schedules import Linear

RISING = {"type": "polynomial", "init": 0.0, "final": 0.8, "start": 0, "stop": 20}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=4),
}
both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


class Literal(nn.Module):
    """The paper's layer: θ is the parameter, the weight is made of it in each forward pass."""

    def __init__(self, layer: nn.Linear, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha
        weight = layer.weight.detach()
        self.theta = nn.Parameter(weight.sign() * weight.abs() ** (1 / alpha))
        self.bias = nn.Parameter(layer.bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        return self.theta * self.theta.abs() ** (self.alpha - 1)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x[:, :6].sin()).square().mean()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        optimizer.step(closure)


def layer() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(12, 6).double()


def sparse(
    optimizer: str = "adamw", alpha: float = 2.0, **options: Any
) -> tuple[nn.Linear, torch.optim.Optimizer]:
    model = layer()
    algorithm = Powerprop(options.pop("sparsity", RISING), alpha=alpha, **options)
    algorithm.apply(model)
    built = OPTIMIZERS[optimizer](model.parameters())
    algorithm.apply(built)
    return model, built


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("alpha", [2.0, 3.0])
@both_storages
def test_training_is_that_of_the_papers_layer(name, alpha, compute):
    model, optimizer = sparse(name, alpha, sparsity=[0.0, 0.5], update={"freq": 100}, compute=compute)
    literal = Literal(layer(), alpha)
    train(model, optimizer, range(10))
    train(literal, OPTIMIZERS[name](literal.parameters()), range(10))
    assert not torch.allclose(literal.weight, layer().weight, atol=1e-3)
    torch.testing.assert_close(model.state_dict()["weight"], literal.weight.detach(), rtol=1e-7, atol=1e-9)


def test_a_power_of_one_is_gmp_to_the_last_bit():
    runs = []
    for kind in (Powerprop, rarefy.GMP):
        model = layer()
        algorithm = kind(RISING, update={"freq": 3}, **({"alpha": 1} if kind is Powerprop else {}))
        algorithm.apply(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        algorithm.apply(optimizer)
        train(model, optimizer, range(25))
        runs.append(model.state_dict())
    assert all(torch.equal(runs[0][key], runs[1][key]) for key in runs[1])
    assert int(runs[0]["weight_mask"].sum()) == round(0.2 * 72)


def test_what_is_pruned_stays_so_and_small_weights_stay_small():
    model, optimizer = sparse(update={"freq": 2}, alpha=3.0)
    before = model.weight.detach().clone()
    pruned = torch.zeros(6, 12, dtype=torch.bool)
    for step in range(20):
        train(model, optimizer, range(step, step + 1))
        assert not model.weight_mask[pruned].any()
        pruned |= ~model.weight_mask
    assert int(pruned.sum()) == 72 - round(0.2 * 72)
    # The derivative is the larger the larger the weight: what is left was among the largest at the beginning.
    assert before.abs()[model.weight_mask].mean() > 1.5 * before.abs()[pruned].mean()


@both_storages
def test_between_steps_everybody_sees_the_weight_and_its_gradient(compute):
    model, optimizer = sparse(compute=compute, update={"freq": 100})
    average = torch.optim.swa_utils.AveragedModel(model)
    loss_of(model, 0).backward()
    gradient = model.weight.grad
    expected = gradient.clone()
    dense = layer()
    loss_of(dense, 0).backward()
    torch.testing.assert_close(gradient.to_dense() if compute == "compact" else gradient, dense.weight.grad)
    optimizer.step()
    # A gradient that is kept, for one more micro-batch say, is that of the weight.
    assert model.weight.grad is gradient
    assert torch.equal(gradient, expected)
    copied = copy.deepcopy(model)
    average.update_parameters(model)
    x = torch.ones(1, 12, dtype=torch.float64)
    weight, bias = model.state_dict()["weight"], model.bias
    for one in (model, copied, average):
        torch.testing.assert_close(one(x), nn.functional.linear(x, weight, bias))
    assert not torch.allclose(weight, layer().weight, atol=1e-4)


def test_a_gradient_that_is_thrown_away_in_the_step_stays_away():
    thrown: list[bool] = []

    class Greedy(torch.optim.SGD):
        def step(self, closure=None):
            super().step()
            self.zero_grad()
            thrown.append(True)

    model = layer()
    algorithm = Powerprop(RISING)
    algorithm.apply(model)
    greedy = Greedy(model.parameters(), lr=0.1)
    algorithm.apply(greedy)
    loss_of(model, 0).backward()
    greedy.step()
    assert thrown and model.weight.grad is None


def test_weights_that_do_not_learn_stay_as_they_are_to_the_last_bit():
    model, optimizer = sparse(alpha=1.375, update={"freq": 100})
    optimizer.param_groups[0]["lr"] = 0.0
    before = model.weight.detach().clone()
    train(model, optimizer, range(5))
    assert torch.equal(model.weight, before)


class Fails(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("out of memory")


@pytest.mark.parametrize("look", ["forward", "state_dict", "step", "evaluation"])
def test_a_step_that_fails_leaves_the_weights_as_they_were(look):
    model = layer()
    algorithm = Powerprop(RISING, update={"freq": 100})
    algorithm.apply(model)
    optimizer = Fails(model.parameters(), lr=0.1)
    algorithm.apply(optimizer)
    x = torch.ones(1, 12, dtype=torch.float64)
    before = model(x).detach()
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step()
    if look == "evaluation":
        model.eval()
    if look == "state_dict":
        weight = model.state_dict()["weight"]
        torch.testing.assert_close(weight, layer().weight.detach())
    if look == "step":
        with pytest.raises(RuntimeError, match="out of memory"):
            optimizer.step()
    torch.testing.assert_close(model(x), before)


def test_optimizers_that_exchange_weights_between_steps_are_refused():
    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    model = layer()
    algorithm = Powerprop(RISING)
    algorithm.apply(model)
    optimizer = ScheduleFree(model.parameters(), lr=0.1)
    with pytest.raises(RarefyError, match="ScheduleFree exchanges weights between its steps"):
        algorithm.apply(optimizer)
    rarefy.GMP([0.0, 0.5]).apply(optimizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 0.9}, "the constant 0.9 is not allowed"),
        ({"sparsity": [0.5, 0.9, 0.7]}, "a schedule that falls is not allowed; give one that rises"),
        ({"sparsity": {**RISING, "init": 0.9}}, "a schedule that falls is not allowed; give one that rises"),
        ({"sparsity": Linear(0.5, -1e-4)}, "a schedule that falls is not allowed; give one that rises"),
        ({"sparsity": RISING, "alpha": 0.5}, "alpha: 0.5 is not allowed; give a number ≥ 1"),
        (
            {"sparsity": [0.0, 0.5], "pattern": {"n": 4, "m": 8, "transposable": True}},
            "pattern: .* is not allowed; give an m of at most 4 for powerprop",
        ),
        ({"sparsity": RISING, "alpha": "two"}, "alpha: 'two' is not allowed; give a number ≥ 0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        Powerprop(**options)


def test_a_cosine_that_rises_is_taken_and_a_fall_is_an_error_when_it_comes():
    model, optimizer = sparse(
        sparsity={"type": "cosine", "init": 0.0, "minimum": 0.8, "half_period": 4}, update={"freq": 2}
    )
    train(model, optimizer, range(5))
    with pytest.raises(RarefyError, match=r"weight: its sparsity falls to 0\.4 at step 6"):
        train(model, optimizer, range(5, 6))


@pytest.mark.parametrize(
    ("sparsity", "value", "step"),
    [
        ([0.25, 0.5], "0.25", 4),
        ({"type": "cosine", "init": 0.0, "minimum": 0.8, "half_period": 4}, "0.4", 6),
        (lambda step: 0.5 if step < 8 else 0.0, "0", 8),
    ],
)
def test_a_fall_within_a_run_of_known_length_is_refused_before_it(sparsity, value, step):
    block = {"algorithm": "powerprop", "sparsity": sparsity, "update": {"freq": 2}}
    message = (
        rf"^sparsity\.sparsity: a schedule that falls to {value} at step {step} is not allowed; give one"
    )
    with pytest.raises(ConfigError, match=message):
        rarefy.configure(block, num_steps=8)
    block["update"] = {"freq": 2, "stop": step}
    rarefy.configure(block, num_steps=8)
    rarefy.configure({**block, "sparsity": RISING, "update": {"freq": 1}}, num_steps=100)


@pytest.mark.parametrize("pattern", [{"n": 2, "m": 4, "transposable": True}, "fan_in", {"block": [2, 4]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_connection_comes_back_under_a_pattern(pattern, dtype):
    torch.manual_seed(0)
    model = nn.Linear(32, 32, dtype=dtype)
    algorithm = Powerprop({**RISING, "final": 0.5, "stop": 8}, pattern=pattern)
    algorithm.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    algorithm.apply(optimizer)
    seen = []
    for _ in range(12):
        optimizer.zero_grad()
        x = torch.randn(16, 32, dtype=dtype)
        (model(x) - x.sin()).square().mean().backward()
        optimizer.step()
        seen.append(model.weight_mask.clone())
    assert not any((new & ~old).any() for old, new in itertools.pairwise(seen))
    assert int(seen[-1].sum()) == 512


def test_a_function_is_not_asked_before_it_is_time():
    asked: list[int] = []
    Powerprop(lambda step: asked.append(step) or 0.5)
    assert not asked
