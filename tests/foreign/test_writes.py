"""Whoever writes to a sparse weight, its gradient or its state: zeros are back after the next step, and are counted."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.nn.utils import prune as torch_prune

import rarefy
from foreign.networks import RIGL, SET, STATIC, assert_zeros, loss_of, network, sparse, step_once
from forks import copies
from rarefy import kernels
from rarefy.errors import RarefyError


def initialise(module):
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)


def all_new(model):
    vector_to_parameters(torch.ones_like(parameters_to_vector(model.parameters())), model.parameters())


def one_row(model):
    model[0].weight.data[3] = 1.0


WRITES = {
    "model.apply(init)": lambda model: model.apply(initialise),
    "reset_parameters": lambda model: model[0].reset_parameters(),
    "vector_to_parameters": all_new,
    "weight.data.add_": lambda model: model[0].weight.data.add_(0.1),
    "one row of weight.data": one_row,
    "weight.copy_": lambda model: model[0].weight.copy_(torch.ones(48, 32)),
    "state_dict()[..].copy_": lambda model: model.state_dict()["0.weight"].copy_(torch.ones(48, 32)),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("block", [STATIC, SET])
def test_zeros_are_back_after_the_next_step(write, block):
    model, optimizer, sparsity = sparse(block)
    step_once(model, optimizer, 0)
    with torch.no_grad():
        WRITES[write](model)
    found = rarefy.summary(sparsity).rows[0]
    assert found.kept == int((model[0].weight_mask | (model[0].weight != 0)).sum()) > 310
    step_once(model, optimizer, 1)
    assert_zeros(model, sparsity)


def test_a_clamp_of_data_keeps_what_it_wrote():
    model, optimizer, sparsity = sparse(STATIC)
    model[0].weight.data.clamp_(-0.01, 0.01)
    optimizer.step()
    assert float(model[0].weight.detach().abs().max()) <= 0.011
    assert_zeros(model, sparsity)


CHANGES = {
    "noise": lambda grad: grad.add_(torch.ones_like(grad)),
    "noise in data": lambda grad: grad.data.add_(torch.ones_like(grad)),
    "detached": lambda grad: grad.detach().add_(1e-3),
    "centred in data": lambda grad: grad.data.sub_(grad.data.mean(0, keepdim=True) + 0.1),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_gradient_that_was_changed_moves_no_inactive_weight(change, kind):
    model, optimizer, sparsity = sparse(STATIC, optimizer=lambda parameters: kind(parameters, lr=0.1))
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        for parameter in model.parameters():
            CHANGES[change](parameter.grad)
        optimizer.step()
        assert_zeros(model, sparsity)
    for state in (optimizer.state[model[0].weight],):
        for value in (v for v in state.values() if v.shape == model[0].weight.shape):
            assert not value[~model[0].weight_mask].any()


def test_what_was_written_beside_the_mask_is_no_start_of_a_new_connection():
    model, _, sparsity = sparse(SET, update={"freq": 1})
    old = model[0].weight_mask.clone()
    model[0].weight.data.fill_(5.0)
    sparsity.update()
    grown = model[0].weight_mask & ~old
    assert grown.any() and not model[0].weight[grown].any()


class Lookahead(torch.optim.Optimizer):
    """Wraps a followed optimizer and writes a slow average into the weights after every step."""

    def __init__(self, inner):
        self.inner, self.param_groups, self.slow = inner, inner.param_groups, {}

    def step(self, closure=None):
        self.inner.step(closure)
        for weight in (p for group in self.param_groups for p in group["params"]):
            slow = self.slow.setdefault(weight, weight.detach().clone())
            slow.add_(weight.data - slow, alpha=0.5)
            weight.data.copy_(slow)


def test_lookahead_around_the_followed_optimizer():
    model, inner, sparsity = sparse(SET, update={"freq": 1})
    optimizer = Lookahead(inner)
    for step in range(5):
        inner.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    inner.zero_grad()
    inner.step()
    assert_zeros(model, sparsity)


def train_shared(model, rank):
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def test_hogwild_writes_from_another_process():
    model, optimizer, sparsity = sparse(STATIC)
    model.share_memory()
    worker = copies().Process(target=train_shared, args=(model, 0))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    assert model[0].weight.detach()[~model[0].weight_mask].any()
    assert rarefy.summary(sparsity).actual_sparsity < 0.5
    step_once(model, optimizer, 0)
    assert_zeros(model, sparsity)


def test_hogwild_trains_the_values_of_compact_weights():
    model, optimizer, sparsity = sparse(STATIC, compute="compact")
    model.share_memory()
    before = model[0].weight.detach().dense()
    worker = copies().Process(target=train_shared, args=(model, 0))
    worker.start()
    worker.join(120)
    assert worker.exitcode == 0
    moved = model[0].weight.detach().dense() != before
    assert moved.any() and not moved[~model[0].weight_mask].any()
    step_once(model, optimizer, 0)
    assert_zeros(model, sparsity)


def test_a_state_dict_of_a_trained_model_has_its_zeros():
    model, _, sparsity = sparse(STATIC)
    model.state_dict()  # nobody wrote, nothing is said
    model[0].weight.data.fill_(1.0)
    with pytest.warns(UserWarning, match=r"0\.weight: something wrote to inactive connections .*finalize"):
        state = model.state_dict()
    assert not state["0.weight"][~state["0.weight_mask"]].any()
    assert_zeros(model, sparsity)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_zeros_are_found_whatever_their_place_and_type(dtype):
    data, mask = torch.zeros(300, 41, dtype=dtype), torch.rand(300, 41) < 0.5
    data[mask] = 1.0
    data[~mask] = -0.0
    assert kernels.holds_zeros(data, mask) and kernels.holds_zeros(data.t(), mask.t())
    for row, column in (~mask).nonzero()[[0, 999, -1]].tolist():
        for value in (1e-7, float("nan")):
            data[row, column] = value
            assert not kernels.holds_zeros(data, mask)
            data[row, column] = 0.0


# ---- weights that are computed by something else ----


def weight_norm(module):
    nn.utils.parametrizations.weight_norm(module)


def prune(module):
    torch_prune.l1_unstructured(module, "weight", 0.5)


def prune_and_remove(module):
    torch_prune.random_unstructured(module, "weight", 0.5)
    torch_prune.remove(module, "weight")


@pytest.mark.parametrize(
    "wrap", [weight_norm, nn.utils.parametrizations.spectral_norm, prune, prune_and_remove]
)
@pytest.mark.parametrize("when", ["before the optimizer", "after it"])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_parametrization_on_top_is_refused(wrap, when, compute):
    model = network()
    sparsity = rarefy.Static(0.8, seed=0, param_filter="0.weight", compute=compute)
    sparsity.apply(model)
    if when == "before the optimizer":
        wrap(model[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RarefyError, match=r"is no parameter of it any more, or .* do that before"):
        sparsity.apply(optimizer)
        if when == "after it":
            wrap(model[0])
        loss_of(model).backward()
        optimizer.step()


# ---- a buffer of the module's own ----


class Autoregressive(nn.Linear):
    """Output i sees inputs before i only."""

    def __init__(self, dtype):
        super().__init__(16, 16)
        self.register_buffer("weight_mask", torch.ones(16, 16).tril(-1).to(dtype))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.weight_mask, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("compute", ["masked", "auto"])
def test_a_mask_of_the_modules_own_is_not_touched(dtype, compute):
    layer = Autoregressive(dtype)
    model, before = nn.Sequential(layer), layer.weight_mask.clone()
    sparsity = rarefy.configure(
        {**RIGL, "sparsity": 0.5, "compute": compute, "seed": 0, "update": {"freq": 1}}
    )
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    first = layer.weight_sparsity_mask.clone()
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 16) * step).square().sum().backward()
        optimizer.step()
    assert torch.equal(layer.weight_mask, before) and not torch.equal(layer.weight_sparsity_mask, first)
    twin = nn.Sequential(Autoregressive(dtype))
    rarefy.configure({**RIGL, "sparsity": 0.5, "seed": 1, "compute": compute}).apply(twin)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin[0].weight_sparsity_mask, layer.weight_sparsity_mask)
    rarefy.finalize(model)
    assert torch.equal(layer.weight_mask, before) and not hasattr(layer, "weight_sparsity_mask")
