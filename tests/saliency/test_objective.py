"""Gradients and Hessian products of a model's loss, against torch's own, and that nothing of the model changes."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from rarefy.errors import RarefyError
from rarefy.saliency.objective import Objective, own_loss, seeded


class Normed(nn.Module):
    """Has what a forward pass changes: statistics, random numbers, its own counter in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(8, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.head(self.drop(torch.relu(self.norm(self.body(x)))))


def data(count: int = 2) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    batches = [
        (torch.randn(7, 6, generator=generator), torch.randint(3, (7,), generator=generator))
        for _ in range(count)
    ]
    return [[batch] for batch in batches]


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: one for name, one in model.named_parameters() if one.dim() > 1}


def test_nothing_of_the_model_changes():
    torch.manual_seed(1)
    model = Normed()
    model.norm.eval()
    loss(model, data()[0][0]).backward()
    before = copy.deepcopy(model.state_dict())
    gradients = {name: one.grad.clone() for name, one in model.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    objective = Objective(model, loss)
    objective.gradients(weights_of(model), data())
    objective.hessian_products(weights_of(model), weights_of(model), data())
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())
    assert all(torch.equal(gradients[name], one.grad) for name, one in model.named_parameters())
    assert [module.training for module in (model, model.norm, model.drop)] == [True, False, True]
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.array_equal(np.random.get_state()[1], states[2])


def test_gradients_are_the_mean_over_batches():
    torch.manual_seed(1)
    model = Normed().double().eval()
    batches = [[(x.double(), y)] for [(x, y)] in data(3)]
    found = Objective(model, loss).gradients(weights_of(model), batches)
    total = sum(loss(model, batch) for [batch] in batches) / 3
    expected = torch.autograd.grad(total, list(weights_of(model).values()))
    for one, name in zip(expected, found, strict=True):
        torch.testing.assert_close(found[name], one)


def test_parts_of_a_batch_add_up():
    torch.manual_seed(1)
    model = Normed().eval()
    [[(x, y)]] = data(1)
    objective = Objective(
        model, lambda model, batch: cross_entropy(model(batch[0]), batch[1], reduction="sum")
    )
    whole = objective.gradients(weights_of(model), [[(x, y)]])
    parts = objective.gradients(weights_of(model), [[(x[:3], y[:3]), (x[3:], y[3:])]])
    for name in whole:
        torch.testing.assert_close(parts[name], whole[name])


def test_hessian_products_against_the_whole_hessian():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(5, 3).double(), torch.tensor([0, 1, 1, 0, 1])
    weights = weights_of(model)
    vectors = {name: torch.randn_like(one) for name, one in weights.items()}
    found = Objective(model, loss).hessian_products(weights, vectors, [[(x, y)]])
    sizes = [one.numel() for one in weights.values()]

    def of(flat: torch.Tensor) -> torch.Tensor:
        pieces = [p.view_as(w) for p, w in zip(flat.split(sizes), weights.values(), strict=True)]
        named = dict(zip(weights, pieces, strict=True))
        return cross_entropy(torch.func.functional_call(model, named, (x,)), y)

    flat = torch.cat([one.detach().flatten() for one in weights.values()])
    hessian = torch.autograd.functional.hessian(of, flat)
    expected = hessian @ torch.cat([one.flatten() for one in vectors.values()])
    torch.testing.assert_close(torch.cat([one.flatten() for one in found.values()]), expected)


def test_attention_has_second_derivatives():
    torch.manual_seed(0)
    layer = nn.Linear(4, 12)

    def attend(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        q, k, v = model(x).chunk(3, -1)
        return scaled_dot_product_attention(q, k, v).square().sum()

    weights = {"weight": layer.weight}
    found = Objective(layer, attend).hessian_products(weights, weights, [[torch.randn(2, 3, 4)]])
    assert found["weight"].abs().sum() > 0


class NoSecond(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return grad * 2


def test_models_without_second_derivatives_are_refused():
    layer = nn.Linear(2, 2)
    objective = Objective(layer, lambda model, x: (NoSecond.apply(model(x)) ** 2).sum())
    with pytest.raises(RarefyError, match=r"Linear has no second derivatives .*; take snip instead"):
        objective.hessian_products({"weight": layer.weight}, {"weight": layer.weight}, [[torch.ones(1, 2)]])


def test_a_loss_linear_in_the_weights_has_no_curvature():
    layer = nn.Linear(2, 2)
    weights = {"weight": layer.weight}
    found = Objective(layer, lambda model, x: model(x).sum()).hessian_products(
        weights, weights, [[torch.ones(1, 2)]]
    )
    assert not found["weight"].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(value):
    layer = nn.Linear(2, 1, bias=False)
    objective = Objective(layer, lambda model, batch: model(batch).square().sum())
    weights = {"weight": layer.weight}
    remedy = "of weight is not finite; look at the data, the weights and the number format"
    with pytest.raises(RarefyError, match=f"the gradient {remedy}"):
        objective.gradients(weights, [[torch.ones(1, 2)], [torch.full((1, 2), value)]])
    with pytest.raises(RarefyError, match=f"the Hessian product {remedy}"):
        objective.hessian_products(weights, {"weight": torch.full((1, 2), value)}, [[torch.ones(1, 2)]])


def test_checkpointed_parts_run_again_with_the_same_weights_and_statistics():
    torch.manual_seed(0)
    model = Normed()

    def checkpointed(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        output = torch.utils.checkpoint.checkpoint(model, batch[0], use_reentrant=False)
        return cross_entropy(output, batch[1])

    before = copy.deepcopy(model.state_dict())
    plain = Objective(model, loss).gradients(weights_of(model), data())
    again = Objective(model, checkpointed).gradients(weights_of(model), data())
    for name in plain:
        torch.testing.assert_close(again[name], plain[name])
    assert all(torch.equal(before[name], one) for name, one in model.state_dict().items())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            lambda model, x: model(x),
            r"the loss is a tensor of shape \[1, 2\]; give loss: a function loss\(model, batch\)",
        ),
        (lambda model, x: 3.0, "the loss is float; give loss:"),
        (lambda model, x: torch.ones(()), "the loss has no gradient; give loss:"),
        (lambda model, x: model.bias.sum() + model(x).sum() * 0 + model.weight.sum() * 0, None),
        (
            lambda model, x: model.bias.sum(),
            "the loss has no gradient|does not depend on weight; leave it out",
        ),
        (own_loss, "the model returned a tensor of shape .* as its loss"),
    ],
)
def test_losses_that_are_none(given, message):
    layer = nn.Linear(2, 2)
    objective = Objective(layer, given)
    if message is None:
        objective.gradients({"weight": layer.weight}, [[torch.ones(1, 2)]])
        return
    with pytest.raises(RarefyError, match=message):
        objective.gradients({"weight": layer.weight}, [[torch.ones(1, 2)]])


def test_a_batch_that_the_model_cannot_take():
    with pytest.raises(
        RarefyError, match=r"the model cannot be called with a batch .* give loss: a function"
    ):
        own_loss(nn.Linear(2, 2), (torch.ones(1, 2), torch.ones(1)))


def test_dropout_is_drawn_from_the_seed():
    torch.manual_seed(0)
    model = Normed()
    weights = weights_of(model)
    first = Objective(model, loss, seed=1).gradients(weights, data())
    torch.manual_seed(99)
    assert torch.equal(
        Objective(model, loss, seed=1).gradients(weights, data())["head.weight"], first["head.weight"]
    )
    assert not torch.equal(
        Objective(model, loss, seed=2).gradients(weights, data())["head.weight"], first["head.weight"]
    )


def test_seeded_restores_after_an_error():
    state = torch.get_rng_state()
    with pytest.raises(ValueError), seeded(1):
        torch.rand(3)
        raise ValueError
    assert torch.equal(torch.get_rng_state(), state)
