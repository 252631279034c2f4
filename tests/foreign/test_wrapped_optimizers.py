"""SAM, Lookahead, wrappers and optimizers that hold other tensors: followed, or refused at the first step."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import rarefy
from rarefy.errors import RarefyError
from rarefy.tensors import SparseWeight


class Sam(Optimizer):
    """Sharpness-aware minimisation as it is usually written: two steps around a second backward pass."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in (p for group in self.param_groups for p in group["params"] if "old" in self.state[p]):
            p.copy_(self.state[p]["old"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure=None):
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()


class Lookahead(Optimizer):
    """Every third step goes halfway back to slow weights."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.optimizer = base
        self.param_groups = base.param_groups
        self.slow = {p: p.detach().clone() + 0.5 for group in self.param_groups for p in group["params"]}
        self.count = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.count += 1
        if self.count % 3 == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)


def start(algorithm="rigl", compute="masked"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 4))
    block = {"algorithm": algorithm, "sparsity": 0.9, "update": {"freq": 2}, "drop_fraction": 0.5, "seed": 0}
    sparsity = rarefy.configure({**block, "compute": compute})
    sparsity.apply(model)
    return model, sparsity


def loss_of(model):
    return (model(torch.ones(8, 32)) - torch.arange(4)).square().mean()


@pytest.mark.parametrize("where", ["wrapper", "base"])
@pytest.mark.parametrize("style", ["two steps", "closure"])
def test_both_steps_of_sam_are_one_step(where, style):
    model, sparsity = start()
    optimizer = Sam(model.parameters(), torch.optim.SGD, lr=1e-2, momentum=0.9)
    sparsity.apply(optimizer if where == "wrapper" else optimizer.base_optimizer)
    first = model[0].weight_mask.clone()
    for _ in range(6):
        loss_of(model).backward()
        if style == "two steps":
            optimizer.first_step()
            loss_of(model).backward()
            optimizer.second_step()
        else:
            optimizer.step(lambda: loss_of(model).backward())
            optimizer.zero_grad()
    mask = model[0].weight_mask
    assert sparsity.step == 6 and sparsity.updates >= 3 and bool((mask & ~first).any())
    assert not model[0].weight[~mask].any()
    assert not optimizer.base_optimizer.state[model[0].weight]["momentum_buffer"][~mask].any()


def test_lookahead_leaves_the_zeros_alone():
    model, sparsity = start("set")
    optimizer = Lookahead(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    sparsity.apply(optimizer)
    for step in range(1, 10):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        assert sparsity.step == step and not model[0].weight[~model[0].weight_mask].any()


def test_an_optimizer_of_other_tensors_is_refused_at_its_first_step():
    model, sparsity = start()
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    sparsity.apply(optimizer)
    loss_of(model).backward()
    with pytest.raises(RarefyError, match=r"SGD trains none of the sparse weights \(0\.weight …\)"):
        optimizer.step()


def test_frozen_weights_in_no_optimizer_are_not_refused():
    model, sparsity = start("set")
    model.requires_grad_(False)
    extra = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([extra], lr=0.1)
    sparsity.apply(optimizer)
    (loss_of(model) * extra).backward()
    optimizer.step()
    assert sparsity.step == 0


# ---- parameters that were replaced, and copies that learn in the place of the model ----


def assigned(model):
    state = {name: torch.as_tensor(dense(value)).clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)


def replaced(model):
    model[0].weight = nn.Parameter(torch.ones(64, 32))


def converted(model):
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


def dense(tensor):
    return tensor.detach().dense() if isinstance(tensor, SparseWeight) else tensor


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("replace", [assigned, replaced, converted])
def test_an_optimizer_of_parameters_that_were_replaced_is_refused(replace, compute):
    model, sparsity = start("set", compute)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsity.apply(optimizer)
    loss_of(model).backward()
    optimizer.step()
    replace(model)
    if replace is converted and compute == "compact":
        return  # stays the same parameter
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(
        RarefyError, match=r"0\.weight is another tensor than the one that AdamW trains: load_state_dict"
    ):
        optimizer.step()
    optimizer = torch.optim.AdamW(model.parameters())
    sparsity.apply(optimizer)
    optimizer.step()
    assert not dense(model[0].weight)[~sparsity.parameters["0.weight"].mask].any()


def test_a_replaced_parameter_that_is_trained_by_another_group_is_followed():
    model, sparsity = start("set")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    replaced(model)
    optimizer.add_param_group({"params": [model[0].weight]})
    loss_of(model).backward()
    optimizer.step()
    assert sparsity.step == 1 and not model[0].weight[~model[0].weight_mask].any()


def test_an_optimizer_of_a_copy_that_learns_alone_is_said():
    model, sparsity = start("set")
    twin = copy.deepcopy(model)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    loss_of(twin).backward()
    with pytest.warns(
        UserWarning, match=r"SGD trains none of the sparse weights \(0\.weight …\), and they get no gradient"
    ):
        optimizer.step()


def test_lbfgs_is_the_same_in_both_storages_while_the_topology_moves():
    """Its directions have a part at dropped connections, which no forward pass may see."""
    found = []
    for compute in ("masked", "compact"):
        model, sparsity = start("set", compute)
        model.double()
        optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=5)
        sparsity.apply(optimizer)
        x = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

        def closure(model=model, optimizer=optimizer, x=x):
            optimizer.zero_grad()
            loss = (model(x) - x[:, :4]).square().mean()
            loss.backward()
            return loss

        for _ in range(6):
            optimizer.step(closure)
        found.append(dense(model[0].weight).detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_growth_is_by_the_gradient_that_lbfgs_asked_for_last(compute, set_to_none):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 4)).double()
    sparsity = rarefy.RigL(0.8, update={"freq": 1}, compute=compute, seed=0)
    sparsity.apply(model)
    plain = rarefy.finalize(copy.deepcopy(model))
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.5, max_iter=4)
    sparsity.apply(optimizer)
    x = torch.randn(8, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    last = {}
    grown_by = []

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        free = {name: dense(one).detach().clone().requires_grad_() for name, one in model.named_parameters()}
        torch.func.functional_call(plain, free, (x,)).square().mean().backward()
        last.update({name: one.grad for name, one in free.items()})
        loss = model(x).square().mean()
        loss.backward()
        return loss

    own = sparsity.update_mask

    def update_mask(view):
        grown_by.append((view.gradient.clone(), last[view.name]))
        return own(view)

    sparsity.update_mask = update_mask
    for _ in range(3):
        optimizer.step(closure)
    assert len(grown_by) == 6
    for found, expected in grown_by:
        torch.testing.assert_close(found, expected)
