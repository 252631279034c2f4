"""Weights that between steps are not what the optimizer trains: who meets which of the two, who writes in vain."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import RarefyError

METHODS: dict[str, dict[str, Any]] = {
    "top_kast": {"algorithm": "top_kast", "sparsity": 0.5, "forward_sparsity": 0.75, "update": {"freq": 3}},
    "powerprop": {"algorithm": "powerprop", "sparsity": [0.25, 0.5], "update": {"freq": 3}},
}
both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])
X = torch.linspace(-1, 1, 32).view(4, 8)


def prepared(
    name: str, compute: str = "masked", kind: Any = torch.optim.AdamW, before: Any = None
) -> tuple[nn.Linear, torch.optim.Optimizer, Any]:
    torch.manual_seed(0)
    model = nn.Linear(8, 16)
    optimizer = kind(model.parameters(), lr=0.05)
    if before is not None:
        before(model, optimizer)
    sparsity = rarefy.configure({**METHODS[name], "compute": compute, "seed": 0})
    sparsity.apply(model)
    sparsity.apply(optimizer)
    return model, optimizer, sparsity


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (model(X) - 1).square().mean().backward()
    optimizer.step()


# ---- state dicts of a weight of which forward passes use a part ----


def by_torch(weight: torch.Tensor) -> None:
    with torch.no_grad():
        weight.mul_(2.0)


def past_torch(weight: torch.Tensor) -> None:
    weight.data.mul_(2.0)


@both_storages
@pytest.mark.parametrize("write", [by_torch, past_torch])
def test_writing_to_a_state_dict_writes_to_the_model(compute, write):
    model, optimizer, _ = prepared("top_kast", compute)
    step(model, optimizer)
    states = [model.state_dict() for _ in range(2)]
    before = model(X).detach() - model.bias.detach()
    # That of the first too, whoever has asked for others since.
    write(states[0]["weight"])
    torch.testing.assert_close(model(X).detach() - model.bias.detach(), 2 * before)


@both_storages
def test_a_state_dict_is_of_the_model_that_computes(compute):
    model, optimizer, _ = prepared("top_kast", compute)
    for _ in range(4):
        step(model, optimizer)
    plain = nn.Linear(8, 16)
    state = {name: value for name, value in model.state_dict().items() if not name.endswith("_mask")}
    plain.load_state_dict({name: value.to_dense() for name, value in state.items()})
    torch.testing.assert_close(plain(X), model(X))
    assert int((plain.weight != 0).sum()) == 32


def in_the_step(model: nn.Module, found: list[dict[str, Any]]) -> Any:
    return lambda *_: found.append(copy.deepcopy(dict(model.state_dict())))


@both_storages
def test_a_state_dict_from_within_a_step_is_of_the_model_that_computes(compute):
    model, optimizer, sparsity = prepared("top_kast", compute)
    step(model, optimizer)
    expected = model.weight.detach().to_dense().clone()
    true = sparsity.parameters["weight"].true_weight()
    found: list[dict[str, Any]] = []
    optimizer.register_step_pre_hook(in_the_step(model, found))
    optimizer.param_groups[0]["lr"] = 0.0
    step(model, optimizer)
    assert torch.equal(found[0]["weight"].to_dense(), expected)
    assert torch.equal(sparsity.parameters["weight"].true_weight(), true)


@both_storages
@pytest.mark.parametrize("loads_sparsity", [False, True])
def test_a_state_dict_of_before_brings_the_outputs_of_before(compute, loads_sparsity):
    model, optimizer, sparsity = prepared("top_kast", compute)
    for _ in range(2):
        step(model, optimizer)
    saved = copy.deepcopy((dict(model.state_dict()), sparsity.state_dict()))
    true = sparsity.parameters["weight"].true_weight()
    expected = model(X).detach()
    # Up to the update, which gives another topology; once more in the topology that was loaded.
    for _ in range(2):
        for _ in range(2):
            step(model, optimizer)
        model.load_state_dict(saved[0])
        if loads_sparsity:
            sparsity.load_state_dict(saved[1])
            assert torch.equal(sparsity.parameters["weight"].true_weight(), true)
        torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    step(model, optimizer)


@both_storages
def test_a_model_that_goes_on_elsewhere_takes_the_same_steps(compute):
    model, optimizer, sparsity = prepared("top_kast", compute)
    for _ in range(4):
        step(model, optimizer)
    saved = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict(), sparsity.state_dict()))
    other, other_optimizer, other_sparsity = prepared("top_kast", compute)
    for one, state in zip((other, other_optimizer, other_sparsity), saved, strict=True):
        one.load_state_dict(state)
    for _ in range(5):
        step(model, optimizer)
        step(other, other_optimizer)
        assert torch.equal(other.weight.detach().to_dense(), model.weight.detach().to_dense())
    assert torch.equal(
        other_sparsity.parameters["weight"].true_weight(), sparsity.parameters["weight"].true_weight()
    )


def test_a_state_of_before_values_were_kept_beside_it_is_taken():
    model, optimizer, sparsity = prepared("top_kast")
    step(model, optimizer)
    expected = model(X).detach()
    true = sparsity.parameters["weight"].true_weight()
    # The weight held them then.
    weights = {**copy.deepcopy(dict(model.state_dict())), "weight": true}
    state = copy.deepcopy(sparsity.state_dict())
    del state["connections"]["weight"]["aside"]
    model.load_state_dict(weights)
    sparsity.load_state_dict(state)
    assert torch.equal(sparsity.parameters["weight"].true_weight(), true)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)


# ---- steps that fail, optimizers that write between steps, hooks of others ----


class Fails(torch.optim.SGD):
    def step(self, closure=None):
        raise RuntimeError("out of memory")


@both_storages
def test_after_a_step_that_failed_forward_passes_use_the_same_part(compute):
    model, optimizer, sparsity = prepared("top_kast", compute, Fails)
    expected = model(X).detach()
    true = sparsity.parameters["weight"].true_weight()
    with pytest.raises(RuntimeError, match="out of memory"):
        step(model, optimizer)
    torch.testing.assert_close(model(X), expected, rtol=0, atol=0)
    assert torch.equal(sparsity.parameters["weight"].true_weight(), true)


def test_optimizers_that_exchange_weights_between_steps_are_refused():
    class ScheduleFree(torch.optim.SGD):
        def eval(self) -> None: ...

    said = "ScheduleFree exchanges weights between its steps .* and TopKAST keeps the values that forward passes do not"
    with pytest.raises(RarefyError, match=said):
        prepared("top_kast", kind=ScheduleFree)


@pytest.mark.parametrize("name", METHODS)
@both_storages
def test_who_hooked_himself_to_the_optimizer_before_sees_the_weight_after_the_step(name, compute):
    seen: list[torch.Tensor] = []

    def look(model: nn.Linear, optimizer: torch.optim.Optimizer) -> None:
        optimizer.register_step_post_hook(lambda *_: seen.append(model.weight.detach().to_dense().clone()))

    model, optimizer, _ = prepared(name, compute, before=look)
    for number in range(4):
        step(model, optimizer)
        assert len(seen) == number + 1
        assert torch.equal(seen[-1], model.weight.detach().to_dense())


class SignMomentum(torch.optim.Optimizer):
    """Moves what is zero."""

    def __init__(self, params: Any, lr: float = 1e-2) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.add_(weight.grad.mean().sign(), alpha=-group["lr"])


def test_an_average_that_is_taken_in_a_hook_is_of_a_sparse_weight():
    averages: list[torch.optim.swa_utils.AveragedModel] = []

    torch.manual_seed(0)
    model = nn.Linear(8, 16)
    optimizer = SignMomentum(model.parameters())
    optimizer.register_step_post_hook(lambda *_: averages[0].update_parameters(model))
    sparsity = rarefy.Static(0.75, seed=0)
    sparsity.apply(model)
    averages.append(torch.optim.swa_utils.AveragedModel(model))
    sparsity.apply(optimizer)
    for _ in range(3):
        step(model, optimizer)
    assert not averages[0].module.weight[~model.weight_mask].any()


# ---- steps that fail, steps that change nothing ----


def fail(*_: Any) -> None:
    raise RuntimeError("in the middle")


def step_that_fails(model: Any, optimizer: Any) -> None:
    """One that raises an error when the weight is in the form that the optimizer trains."""
    handle = optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        step(model, optimizer)
    handle.remove()


@both_storages
@pytest.mark.parametrize("name", METHODS)
def test_a_model_that_is_finalized_after_a_failed_step_computes_as_before(name: str, compute: str) -> None:
    model, optimizer, _ = prepared(name, compute)
    step(model, optimizer)
    expected = model(X).detach()
    step_that_fails(model, optimizer)
    rarefy.finalize(model)
    torch.testing.assert_close(model(X), expected)


@both_storages
@pytest.mark.parametrize("name", METHODS)
def test_a_gradient_that_is_zeroed_after_a_failed_step_stays_zero(name: str, compute: str) -> None:
    grads = []
    for fails in (True, False):
        model, optimizer, _ = prepared(name, compute)
        step(model, optimizer)
        if fails:
            step_that_fails(model, optimizer)
            optimizer.zero_grad(set_to_none=False)
        else:
            optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        grads.append(model.weight.grad.to_dense())
    torch.testing.assert_close(grads[0], grads[1])


@both_storages
@pytest.mark.parametrize("name", METHODS)
def test_a_weight_that_is_used_by_itself_after_a_failed_step_is_refused(name: str, compute: str) -> None:
    grads = []
    for fails in (True, False):
        model, optimizer, _ = prepared(name, compute)
        step(model, optimizer)
        if fails:
            step_that_fails(model, optimizer)
            optimizer.zero_grad(set_to_none=False)
            with pytest.raises(
                RarefyError, match="weight was used without its module after a step that raised"
            ):
                nn.functional.linear(X, model.weight).square().sum().backward()
        optimizer.zero_grad(set_to_none=False)
        with torch.no_grad():
            model(X)
        nn.functional.linear(X, model.weight).square().sum().backward()
        grads.append(model.weight.grad.to_dense())
    torch.testing.assert_close(grads[0], grads[1])


@both_storages
@pytest.mark.parametrize("name", METHODS)
def test_other_weights_are_left_alone_after_a_failed_step(name: str, compute: str) -> None:
    model, optimizer, _ = prepared(name, compute)
    step(model, optimizer)
    expected = model(X).detach()
    step_that_fails(model, optimizer)
    fast = nn.Parameter(torch.full((16, 8), 0.25))
    torch.func.functional_call(model, {"weight": fast}, (X,))
    assert bool((fast == 0.25).all())
    torch.testing.assert_close(model(X), expected)


@pytest.mark.parametrize("name", METHODS)
def test_attention_computes_as_before_after_a_failed_step(name: str) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, bias=False)
    x = torch.randn(3, 2, 8)
    sparsity = rarefy.configure({**METHODS[name], "compute": "masked", "seed": 0})
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    model(x, x, x)[0].square().sum().backward()
    expected = model(x, x, x)[0].detach()
    optimizer.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        optimizer.step()
    torch.testing.assert_close(model(x, x, x)[0], expected)


@both_storages
@pytest.mark.parametrize("name", METHODS)
def test_a_compiled_model_computes_as_before_after_a_failed_step(name: str, compute: str) -> None:
    model, optimizer, _ = prepared(name, compute)
    compiled = torch.compile(model, backend="eager")
    step(compiled, optimizer)
    expected = compiled(X).detach()
    step_that_fails(compiled, optimizer)
    for _ in range(2):
        torch.testing.assert_close(compiled(X), expected)
    step(compiled, optimizer)
    torch.testing.assert_close(compiled(X), model(X))


@both_storages
def test_a_step_at_a_learning_rate_of_0_leaves_powerprop_as_it_is_and_fills_the_states_of_what_it_trains(
    compute: str,
) -> None:
    model, optimizer, sparsity = prepared("powerprop", compute, torch.optim.Adam)
    before = sparsity.parameters["weight"].true_weight()
    optimizer.param_groups[0]["lr"] = 0.0
    (model(X) - 1).square().mean().backward()
    gradient = sparsity.parameters["weight"].storage.collect(model.weight.grad.detach()).clone()
    entries = sparsity.parameters["weight"].storage.entries.detach().clone()
    optimizer.step()
    assert torch.equal(sparsity.parameters["weight"].true_weight(), before)
    # w = θ·|θ|, so dw/dθ = 2·|θ| = 2·√|w|
    expected = 0.1 * gradient * 2 * entries.abs().sqrt()
    found = sparsity.parameters["weight"].storage.collect(optimizer.state[model.weight]["exp_avg"])
    torch.testing.assert_close(found, expected)


def test_zeros_hold_against_a_hook_of_before_that_writes_to_weights() -> None:
    def add_noise(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        def noise(*_: Any) -> None:
            with torch.no_grad():
                model.weight.add_(0.5)

        optimizer.register_step_post_hook(noise)

    model, optimizer, sparsity = prepared("top_kast", before=add_noise)
    for _ in range(4):
        step(model, optimizer)
        kept = sparsity.parameters["weight"].mask
        assert not model.weight[~kept].any()
        assert model.weight[kept].any()


@both_storages
def test_a_hook_before_the_step_writes_to_all_that_is_trained(compute: str) -> None:
    model, optimizer, sparsity = prepared("top_kast", compute, torch.optim.SGD)
    parameter = sparsity.parameters["weight"]
    largest = parameter.true_weight().abs().max()
    optimizer.param_groups[0]["lr"] = 1e-9

    def clip(*_: Any) -> None:
        with torch.no_grad():
            model.weight.clamp_(-0.05, 0.05)

    optimizer.register_step_pre_hook(clip)
    step(model, optimizer)
    assert largest > 0.1
    hidden = parameter.true_weight().masked_select(parameter.mask & (model.weight.to_dense() == 0))
    assert len(hidden) and 0.04 < hidden.abs().max() <= 0.0501
