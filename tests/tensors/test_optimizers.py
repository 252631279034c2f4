"""Every optimizer of torch, and one of another kind, trains a sparse weight as a dense one held at its zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn, optim

from rarefy.tensors import SparseWeight
from sparse_weights import Pair, inputs, layers, masks_of, move


class Shampoo(optim.Optimizer):
    """Preconditions with two square matrices for each weight."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if p.dim() != 2:
                p.add_(p.grad, alpha=-0.05)
                continue
            if not state:
                state.update(left=torch.eye(p.shape[0]), right=torch.eye(p.shape[1]), m=torch.zeros_like(p))
            state["left"].add_(p.grad @ p.grad.t())
            state["right"].add_(p.grad.t() @ p.grad)
            step = torch.linalg.inv(state["left"]) @ p.grad @ torch.linalg.inv(state["right"])
            state["m"].mul_(0.9).add_(step)
            p.add_(state["m"], alpha=-0.05)


OPTIMIZERS = {
    "sgd": lambda p: optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01, foreach=False),
    "sgd foreach": lambda p: optim.SGD(p, 0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd fused": lambda p: optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adamw": lambda p: optim.AdamW(p, 1e-2, foreach=False, amsgrad=True),
    "adamw foreach": lambda p: optim.AdamW(p, 1e-2, foreach=True),
    "adamw fused": lambda p: optim.AdamW(p, 1e-2, fused=True),
    "adam fused": lambda p: optim.Adam(p, 1e-2, fused=True, weight_decay=0.1),
    "adagrad": lambda p: optim.Adagrad(p, 1e-2),
    "adagrad with a start": lambda p: optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1, foreach=True),
    "adagrad fused": lambda p: optim.Adagrad(p, 1e-2, fused=True),
    "rmsprop": lambda p: optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "rmsprop foreach": lambda p: optim.RMSprop(p, 1e-3, foreach=True),
    "nadam": lambda p: optim.NAdam(p, 1e-3),
    "radam": lambda p: optim.RAdam(p, 1e-3),
    "asgd": lambda p: optim.ASGD(p, 1e-2),
    "rprop": lambda p: optim.Rprop(p, 1e-3),
    "adadelta": lambda p: optim.Adadelta(p, 1.0),
    "adamax": lambda p: optim.Adamax(p, 1e-3),
    "adafactor": lambda p: optim.Adafactor(p, 1e-2),
    "shampoo": Shampoo,
}


def learn(model, optimizer, step, hold=None):
    optimizer.zero_grad()
    F.cross_entropy(model(inputs(step, 32)), torch.arange(32) % 8).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    optimizer.step()
    for name, mask in (hold or {}).items():
        model.get_parameter(name).data.mul_(mask)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_trains_as_the_dense_weight_with_its_zeros_held(name):
    pair = Pair()
    for model, hold in ((pair.dense, pair.masks), (pair.sparse, None)):
        optimizer = OPTIMIZERS[name](model.parameters())
        for step in range(5):
            learn(model, optimizer, step, hold)
    pair.assert_equal()


@pytest.mark.skipif(not hasattr(optim, "Muon"), reason="this torch has no Muon")
def test_muon():
    pair = Pair()
    for model, hold in ((pair.dense, pair.masks), (pair.sparse, None)):
        optimizer = optim.Muon([p for p in model.parameters() if p.dim() == 2], 1e-2)
        for step in range(4):
            learn(model, optimizer, step, hold)
    pair.assert_equal()


def test_lbfgs():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        optimizer = optim.LBFGS(model.parameters(), 0.3, max_iter=4)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(inputs(0)).square().mean()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
    pair.assert_equal(rtol=1e-3, atol=1e-5)


def test_sparse_adam_says_that_it_wants_sparse_gradients():
    pair = Pair()
    optimizer = optim.SparseAdam([pair.sparse[0].weight])
    pair.sparse(inputs(0)).sum().backward()
    with pytest.raises(RuntimeError, match="does not support dense gradients"):
        optimizer.step()


def test_states_are_sparse_where_they_are_of_the_weights_shape():
    pair = Pair()
    optimizer = OPTIMIZERS["adamw fused"](pair.sparse.parameters())
    learn(pair.sparse, optimizer, 0)
    state = optimizer.state[pair.sparse[0].weight]
    assert type(state["exp_avg"]) is SparseWeight and type(pair.sparse[0].weight.grad) is SparseWeight
    assert state["exp_avg"].entries.shape == pair.sparse[0].weight.entries.shape


@pytest.mark.parametrize("name", ["adamw fused", "sgd", "adafactor", "shampoo", "adamw foreach"])
def test_training_goes_on_over_a_change_of_topology(name):
    pair = Pair()
    new = masks_of(pair.dense, seed=21)
    for model in (pair.dense, pair.sparse):
        optimizer, hold = OPTIMIZERS[name](model.parameters()), pair.masks
        for step in range(6):
            if step == 3:
                hold = new
                for key, mask in new.items():
                    weight = model.get_parameter(key)
                    if model is pair.sparse:
                        move(weight, mask, optimizer)
                        continue
                    both = mask & pair.masks[key]
                    weight.data.mul_(both)
                    weight._backward_hooks.clear()
                    weight.register_hook(lambda grad, mask=mask: grad * mask)
                    for state in ("exp_avg", "exp_avg_sq", "momentum_buffer", "m"):
                        if state in optimizer.state[weight]:
                            optimizer.state[weight][state].mul_(both)
            learn(model, optimizer, step, hold if model is pair.dense else None)
    pair.masks = new
    pair.assert_equal()


def test_gradients_that_are_accumulated_scaled_and_zeroed_in_place():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        optimizer = optim.AdamW(model.parameters(), 1e-2, foreach=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
        for step in range(4):
            optimizer.zero_grad(set_to_none=False)
            for part in inputs(step).chunk(2):
                scaler.scale(model(part).square().mean()).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            scaler.step(optimizer)
            scaler.update()
    pair.assert_equal()


def test_noise_on_the_gradients_reaches_active_connections_only():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        optimizer = optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(step)).square().mean().backward()
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad.add_(torch.randn(parameter.shape), alpha=0.1)
            if model is pair.dense:
                for name, mask in pair.masks.items():
                    model.get_parameter(name).grad.mul_(mask)
            optimizer.step()
    pair.assert_equal()


def test_a_gradient_that_somebody_assigned_dense_is_taken_at_active_connections():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        optimizer = optim.AdamW(model.parameters(), 1e-2, fused=True)
        for step in range(3):
            optimizer.zero_grad()
            model(inputs(step)).square().mean().backward()
            torch.manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            optimizer.step()
            for name, mask in pair.masks.items() if model is pair.dense else ():
                model.get_parameter(name).data.mul_(mask)
    pair.assert_equal()


def test_a_model_of_another_width_shares_nothing():
    pair = Pair(lambda: layers(8))
    pair.sparse(inputs(0, columns=8)).sum().backward()
    assert pair.sparse[0].weight.grad.topology is pair.sparse[0].weight.topology
