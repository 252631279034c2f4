"""What every registered algorithm owes its users; a new algorithm joins through the registry alone."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import rarefy
from contract_rows import ROWS, aiming_at, kept_of, options_of, takes
from helpers import (
    assert_exact_zeros,
    assert_identical,
    same,
    small_model,
    snapshot,
    sparse_parameters,
    train_step,
)
from rarefy.methods.registry import ALGORITHMS

DTYPES = [torch.float32, torch.bfloat16, torch.float64]
every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


class SignMomentum(torch.optim.Optimizer):
    """Somebody's own optimizer, not element-wise: every step moves every weight by the mean update."""

    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.mul_(0.9).add_(weight.grad.mean() + weight.grad)
                weight.add_(momentum.sign(), alpha=-group["lr"])


class Orthogonal(torch.optim.Optimizer):
    """Muon-like: momentum, then the orthogonal factor of the whole matrix."""

    def __init__(self, params, lr=1e-2):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for weight in (w for w in group["params"] if w.grad is not None):
                momentum = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                momentum.mul_(0.95).add_(weight.grad)
                flat = momentum.flatten(1) if momentum.dim() > 1 else momentum[None]
                left, _, right = torch.linalg.svd(flat.double(), full_matrices=False)
                weight.add_((left @ right).view_as(weight).to(weight.dtype), alpha=-group["lr"])


OPTIMIZERS = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adam amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True, weight_decay=0.1),
    "adamw eps 0": lambda p: torch.optim.AdamW(p, lr=1e-2, eps=0.0),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, centered=True, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon-like": Orthogonal,
    "not element-wise": SignMomentum,
}


def prepare(name, model, make_optimizer=OPTIMIZERS["adamw"], **changes):
    sparsity = rarefy.configure({"algorithm": name, "seed": 1, **options_of(name), **changes})
    sparsity.apply(model)
    optimizer = make_optimizer(model.parameters())
    sparsity.apply(optimizer)
    return sparsity, optimizer


@every_algorithm
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
def test_inactive_connections_are_exact_zeros_after_every_step(name, optimizer_name):
    model = small_model()
    sparsity, optimizer = prepare(name, model, OPTIMIZERS[optimizer_name])
    assert_exact_zeros(sparsity, optimizer)
    for step in range(5):
        train_step(model, optimizer, step)
        assert_exact_zeros(sparsity, optimizer)


@every_algorithm
@pytest.mark.parametrize("dtype", DTYPES)
def test_kept_counts_are_exact_in_every_dtype(name, dtype):
    model = small_model(dtype)
    sparsity, optimizer = prepare(name, model)
    for step in range(6):
        train_step(model, optimizer, step)
        for parameter in sparse_parameters(sparsity):
            expected = kept_of(name, parameter.shape, sparsity.target_sparsity)
            assert int(parameter.mask.sum()) == expected
    assert_exact_zeros(sparsity, optimizer)


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_model_that_nobody_holds_leaves_the_memory(compute):
    def train(name):
        model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20))
        sparsity, optimizer = prepare(name, model, compute=compute)
        for step in range(3):
            train_step(model, optimizer, step)
        return [weakref.ref(one) for one in (model, *model.parameters(), optimizer, sparsity)]

    remains = {name: train(name) for name in ALGORITHMS}
    # Once for all, as it looks through everything that the tests of a process have left.
    gc.collect()
    assert [name for name, those in remains.items() if any(one() is not None for one in those)] == []


@every_algorithm
@pytest.mark.parametrize("balance", ["balance_in_groups", "balance_out_groups"])
def test_groups_stay_balanced(name, balance):
    model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 20))
    sparsity, optimizer = prepare(name, model, **{balance: 4})
    axis = 1 if balance == "balance_in_groups" else 0
    for step in range(5):
        train_step(model, optimizer, step)
        for parameter in sparse_parameters(sparsity):
            groups = parameter.mask.chunk(4, dim=axis)
            expected = kept_of(name, groups[0].shape, sparsity.target_sparsity)
            assert {int(group.sum()) for group in groups} == {expected}


@every_algorithm
@given(
    groups=st.integers(1, 4),
    size=st.integers(1, 4),
    other=st.integers(1, 6),
    axis=st.sampled_from([0, 1]),
    target=st.floats(0, 0.99),
    dtype=st.sampled_from(DTYPES),
)
def test_any_groups_have_equal_counts(name, groups, size, other, axis, target, dtype):
    shape = (groups * size, other) if axis == 0 else (other, groups * size)
    model = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
    balance = {("balance_out_groups", "balance_in_groups")[axis]: groups}
    changes = aiming_at(name, target)
    sparsity, optimizer = prepare(name, model, OPTIMIZERS["sgd momentum"], **changes, **balance)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, shape[1], dtype=dtype)).square().sum().backward()
        optimizer.step()
        pieces = model.weight_mask.chunk(groups, dim=axis)
        expected = kept_of(name, pieces[0].shape, sparsity.target_sparsity)
        assert {int(piece.sum()) for piece in pieces} == {expected}
    assert_exact_zeros(sparsity, optimizer)


@every_algorithm
@given(
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
    target=st.floats(0, 0.99),
    dtype=st.sampled_from(DTYPES),
)
def test_counts_hold_for_any_shape_and_sparsity(name, shape, target, dtype):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(shape).to(dtype))

    changes = aiming_at(name, target)
    model = Holder()
    sparsity, optimizer = prepare(name, model, OPTIMIZERS["sgd momentum"], **changes)
    for _ in range(3):
        optimizer.zero_grad()
        (model.kernel * model.kernel.detach().cos()).sum().backward()
        optimizer.step()
        # No weight is left without any connection.
        assert int(model.kernel_mask.sum()) == kept_of(name, shape, sparsity.target_sparsity)
    assert_exact_zeros(sparsity, optimizer)


@every_algorithm
def test_masks_depend_on_the_seed_alone(name):
    first, second, other = (prepare(name, small_model(), seed=seed) for seed in (7, 7, 8))
    torch.manual_seed(123)
    masks = [[p.mask.clone() for p in sparse_parameters(sparsity)] for sparsity, _ in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(masks[0], masks[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(masks[0], masks[2], strict=True))


@every_algorithm
def test_the_optimizer_may_come_first(name):
    runs = []
    for optimizer_first in (False, True):
        model = small_model()
        sparsity = rarefy.configure({"algorithm": name, "seed": 1, **options_of(name)})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for target in (optimizer, model) if optimizer_first else (model, optimizer):
            sparsity.apply(target)
        for step in range(4):
            train_step(model, optimizer, step)
        runs.append(snapshot(model, optimizer))
    assert_identical(*runs)


CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cycling": {"sparsity": [0.5, 0.8, 0.65]},
    "annealed": {"drop_fraction": {"type": "cosine", "init": 0.5, "half_period": 7}},
}


def can_change(name, changes):
    keeps_one = ROWS[name].sparsity == "constant" or ROWS[name].rises
    return all(takes(name, key) for key in changes) and not ("sparsity" in changes and keeps_one)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        pytest.param(name, changes, id=f"{name}-{key}")
        for name in ALGORITHMS
        for key, changes in CHANGES.items()
        if can_change(name, changes)
    ],
)
def test_resume_is_bit_identical(name, changes):
    model = small_model()
    sparsity, optimizer = prepare(name, model, **changes)
    losses, saved = [], {}
    for step in range(8):
        if step in (1, 4, 5):
            saved[step] = copy.deepcopy((model.state_dict(), optimizer.state_dict(), sparsity.state_dict()))
        losses.append(train_step(model, optimizer, step, micro_batches=2))
    for stop, states in saved.items():
        resumed = small_model(seed=99)
        again, other_optimizer = prepare(name, resumed, seed=55, **changes)
        for target, state in zip((resumed, other_optimizer, again), states, strict=True):
            target.load_state_dict(state)
        found = [train_step(resumed, other_optimizer, step, micro_batches=2) for step in range(stop, 8)]
        assert found == losses[stop:], stop
        assert_identical(snapshot(model, optimizer), snapshot(resumed, other_optimizer))
        assert same(sparsity.state_dict(), again.state_dict())


@every_algorithm
def test_a_skipped_step_changes_nothing(name):
    model = small_model()
    sparsity, optimizer = prepare(name, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    train_step(model, optimizer, 0)
    before, k = snapshot(model, optimizer), sparsity.step
    optimizer.zero_grad()
    scaler.scale(model(torch.full((2, 12), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert_identical(before, snapshot(model, optimizer))
    assert sparsity.step == k
    train_step(model, optimizer, 1)
    assert sparsity.step == k + 1
    assert_exact_zeros(sparsity, optimizer)


@every_algorithm
def test_a_skip_inside_a_fused_optimizer_changes_nothing(name):
    model = small_model()
    sparsity, optimizer = prepare(name, model, OPTIMIZERS["adamw fused"])
    train_step(model, optimizer, 0)
    before, k = snapshot(model, optimizer), sparsity.step
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.zero_grad()
    scaler.scale(model(torch.full((2, 12), float("inf"))).sum()).backward()
    scaler.step(optimizer)
    assert sparsity.step == k
    assert_identical(
        {k: v for k, v in before.items() if "step" not in k},
        {k: v for k, v in snapshot(model, optimizer).items() if "step" not in k},
    )


@every_algorithm
def test_nan_gradients_of_inactive_connections_vanish(name):
    model = nn.Linear(12, 8, bias=False)
    sparsity, optimizer = prepare(name, model)
    inactive = ~model.weight_mask
    model.weight.register_hook(lambda grad: torch.where(inactive, torch.nan, grad))
    for step in range(1):
        train_step(model, optimizer, step)
    assert torch.isfinite(model.weight).all()
    assert_exact_zeros(sparsity, optimizer)


@every_algorithm
@pytest.mark.parametrize("zero_grad", ["model", "optimizer", "in place"])
def test_zero_grad_of_any_kind_starts_afresh(name, zero_grad):
    """A gradient that is thrown away leaves no trace, in whichever way it is thrown away."""
    runs = []
    for wasted in (False, True):
        model = small_model()
        sparsity, optimizer = prepare(name, model)
        clear = {
            "model": model.zero_grad,
            "optimizer": optimizer.zero_grad,
            "in place": lambda o=optimizer: o.zero_grad(set_to_none=False),
        }[zero_grad]
        for step in range(4):
            if wasted:
                (100 * model(torch.full((2, 12), float(step + 1))).square().sum()).backward()
            clear()
            (model(torch.linspace(-1, 1, 24).view(2, 12) * (step + 1)) - 1).square().mean().backward()
            optimizer.step()
            clear()
        runs.append(snapshot(model, optimizer))
        assert_exact_zeros(sparsity, optimizer)
    assert_identical(*runs)


@every_algorithm
def test_several_optimizers_are_one_training_step(name):
    model = small_model()
    sparsity = rarefy.configure({"algorithm": name, "seed": 1, **options_of(name)})
    sparsity.apply(model)
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    optimizers = [Orthogonal(matrices), torch.optim.AdamW(others, lr=1e-2)]
    for optimizer in optimizers:
        sparsity.apply(optimizer)
    for step in range(4):
        model.zero_grad()
        model(torch.randn(4, 12)).square().mean().backward()
        for optimizer in optimizers:
            optimizer.step()
            assert_exact_zeros(sparsity, optimizer)
        assert sparsity.step == step + 1


@every_algorithm
def test_autocast_bfloat16(name):
    model = small_model()
    sparsity, optimizer = prepare(name, model)
    for _ in range(4):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(torch.randn(4, 12)).float().square().mean()
        loss.backward()
        optimizer.step()
    assert sparsity.step == 4
    assert_exact_zeros(sparsity, optimizer)


@every_algorithm
def test_a_compiled_model_trains_like_the_plain_one(name):
    torch.compiler.reset()
    runs = []
    for compiled in (False, True):
        model = small_model()
        sparsity, optimizer = prepare(name, model, OPTIMIZERS["sgd momentum"])
        graph = torch.compile(model, fullgraph=True, backend="aot_eager") if compiled else model
        for step in range(5):
            train_step(graph, optimizer, step)
            assert_exact_zeros(sparsity, optimizer)
        assert sparsity.step == 5
        runs.append(snapshot(model, optimizer))
    assert_identical(*runs)


@every_algorithm
def test_parameters_without_gradient(name):
    model = small_model()
    model[0].weight.requires_grad_(False)
    sparsity, optimizer = prepare(name, model)
    for step in range(4):
        train_step(model, optimizer, step)
    assert not model[0].weight.requires_grad and model[0].weight.grad is None
    assert_exact_zeros(sparsity, optimizer)
    model[0].weight.requires_grad_(True)
    train_step(model, optimizer, 4)
    assert_exact_zeros(sparsity, optimizer)


@every_algorithm
def test_loading_a_state_never_changes_it(name):
    model = small_model()
    sparsity, optimizer = prepare(name, model)
    train_step(model, optimizer, 0)
    state = sparsity.state_dict()
    kept = copy.deepcopy(state)
    sparsity.load_state_dict(state)
    for step in range(1, 4):
        train_step(model, optimizer, step)
    assert same(state, kept)
