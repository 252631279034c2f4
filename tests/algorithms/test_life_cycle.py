"""Timing, accumulation, hooks and state of an applied algorithm (every rule that is the same for all of them)."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

import rarefy
from helpers import assert_exact_zeros, batch, small_model, sparse_parameters, train_step
from rarefy.errors import ConfigError, RarefyError


def start(block, model=None, lr=0.05):
    torch.manual_seed(0)
    model = model or nn.Linear(12, 10)
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def targets_by_step(block, steps):
    model, sparsity, optimizer = start(block)
    found = {0: round(sparsity.target_sparsity, 6)}
    for step in range(1, steps + 1):
        updates = sparsity.updates
        train_step(model, optimizer, step)
        if sparsity.updates > updates:
            found[sparsity.step] = round(sparsity.target_sparsity, 6)
    return found


def test_the_model_is_sparse_before_the_first_step():
    model, sparsity, _ = start(0.9)
    assert sparsity.step == 0
    assert int(model.weight_mask.sum()) == int((model.weight != 0).sum()) == 12
    assert "weight_mask" in model.state_dict()


@pytest.mark.parametrize("algorithm", ["gmp", "set", "rigl"])
def test_cycling_advances_on_update_steps_alone(algorithm):
    block = {"algorithm": algorithm, "sparsity": [0.1, 0.3, 0.6], "update": {"freq": 2}}
    assert targets_by_step(block, 7) == {0: 0.1, 2: 0.3, 4: 0.6, 6: 0.1}


@pytest.mark.parametrize("algorithm", ["gmp", "set", "rigl"])
def test_cycling_after_a_dense_start(algorithm):
    block = {"algorithm": algorithm, "sparsity": [0.1, 0.3, 0.6], "update": {"freq": 2, "start": 3}}
    assert targets_by_step(block, 7) == {0: 0.0, 3: 0.1, 5: 0.3, 7: 0.6}


@pytest.mark.parametrize("algorithm", ["gmp", "set", "rigl"])
def test_a_late_start_is_dense_until_the_first_update_and_then_at_the_target(algorithm):
    sparsity = {"type": "linear", "init": 0.5, "slope": 0.1}
    model, algorithm, optimizer = start(
        {"algorithm": algorithm, "sparsity": sparsity, "update": {"steps": [3]}}
    )
    for step in range(3):
        assert model.weight_mask.all()
        train_step(model, optimizer, step)
    assert int(model.weight_mask.sum()) == 24
    assert_exact_zeros(algorithm, optimizer)


@pytest.mark.parametrize("algorithm", ["set", "rigl"])
def test_the_first_update_after_a_dense_start_keeps_the_largest_weights(algorithm):
    model, _, optimizer = start(
        {"algorithm": algorithm, "sparsity": 0.2, "drop_fraction": 0.9, "update": {"steps": [1]}}, lr=1e-9
    )
    weight = model.weight.detach().clone()
    train_step(model, optimizer, 0)
    assert torch.equal(model.weight_mask, rarefy.masks.keep_top(weight.abs(), 96))


def test_the_drop_fraction_is_read_at_the_step():
    replaced = []
    drop = {"type": "cosine", "init": 0.5, "half_period": 4}
    model, sparsity, optimizer = start(
        {"algorithm": "set", "sparsity": 0.5, "drop_fraction": drop, "seed": 0}
    )
    sparsity.register_topology_hook(lambda a, name, old, new: replaced.append(int((old & ~new).sum())))
    for step in range(4):
        train_step(model, optimizer, step)
    assert replaced[3] == 0
    assert replaced[0] > replaced[2] > 0


def test_growing_sees_what_was_just_dropped():
    """With every other position inactive and a gradient only at dropped ones, RigL grows them again, weight kept."""
    layer = nn.Linear(4, 1, bias=False)
    algorithm = rarefy.RigL(
        0.5, drop_fraction=0.5, init_method=lambda w, s: torch.tensor([[True, True, False, False]])
    )
    algorithm.apply(layer)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.1, 5.0, 0.0, 0.0]]))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, momentum=0.9)
    algorithm.apply(optimizer)
    layer(torch.tensor([[9.0, 1.0, 1.0, 1.0]])).sum().backward()
    optimizer.step()
    assert layer.weight_mask.tolist() == [[True, True, False, False]]
    assert layer.weight[0, 0] == torch.tensor(0.1)
    assert optimizer.state[layer.weight]["momentum_buffer"][0, 0] == 9.0


def test_grown_connections_start_at_zero_weight_and_state():
    model, sparsity, optimizer = start({"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 3}})
    seen = []

    def check(algorithm, name, old, new):
        grown = new & ~old
        seen.append(int(grown.sum()))
        assert not model.weight[grown].any()
        assert not optimizer.state[model.weight]["momentum_buffer"][grown].any()

    sparsity.register_topology_hook(check)
    for step in range(7):
        train_step(model, optimizer, step)
    assert len(seen) == 2 and min(seen) > 0


def test_accumulated_dense_gradients_equal_those_of_the_whole_batch():
    grown = []
    for pieces in (1, 3):
        torch.manual_seed(0)
        layer = nn.Linear(12, 10).double()
        model, _, optimizer = start({"algorithm": "rigl", "sparsity": 0.8, "seed": 1}, layer)
        nn.init.normal_(model.weight.data).mul_(model.weight_mask)
        inputs = batch(0, torch.float64)
        for piece in inputs.chunk(pieces):
            ((model(piece) - 1).square().mean() / pieces).backward()
        optimizer.step()
        grown.append(model.weight_mask.clone())
    assert torch.equal(*grown)


def test_a_state_saved_inside_an_accumulation_window_goes_on_exactly():
    def window(model, piece):
        ((model(piece) - 1).square().mean() / 2).backward()

    model, sparsity, optimizer = start({"algorithm": "rigl", "sparsity": 0.8, "seed": 1})
    first, second = batch(0).chunk(2)
    window(model, first)
    state, grad = sparsity.state_dict(), model.weight.grad.clone()
    assert set(state["dense_gradients"]) == {"weight"}
    other, again, other_optimizer = start({"algorithm": "rigl", "sparsity": 0.8, "seed": 2})
    other.load_state_dict(model.state_dict())
    again.load_state_dict(state)
    other.weight.grad, other.bias.grad = grad, model.bias.grad.clone()
    for m, o in ((model, optimizer), (other, other_optimizer)):
        window(m, second)
        o.step()
    assert torch.equal(model.weight_mask, other.weight_mask)
    assert torch.equal(model.weight, other.weight)


def test_dense_gradients_exist_around_update_steps_only():
    model, sparsity, optimizer = start({"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 3}})
    kept = []
    for step in range(6):
        optimizer.zero_grad()
        model(batch(step)).sum().backward()
        kept.append(sparsity.parameters["weight"].dense_gradient.value is not None)
        optimizer.step()
        assert sparsity.parameters["weight"].dense_gradient.value is None
    assert kept == [False, False, True, False, False, True]


def test_hooks_tell_target_and_measured_sparsity_and_can_be_removed():
    model, sparsity, optimizer = start({"algorithm": "gmp", "sparsity": [0.5, 0.75]})
    calls = []
    handles = [
        sparsity.register_target_sparsity_hook(
            lambda a, name, value: calls.append(("target", a, name, value))
        ),
        sparsity.register_computed_sparsity_hook(
            lambda a, name, value: calls.append(("actual", a, name, value))
        ),
    ]
    train_step(model, optimizer, 0)
    assert calls == [("target", sparsity, "weight", 0.75), ("actual", sparsity, "weight", 0.75)]
    for handle in handles:
        handle.remove()
    train_step(model, optimizer, 1)
    assert len(calls) == 2


def test_the_measured_sparsity_is_measured():
    """97 % of 10 connections cannot be had: the target says 0.97, the mask 0.9, as one connection is left."""
    _, sparsity, _ = start({"sparsity": 0.97}, nn.Linear(5, 2))
    row = rarefy.summary(sparsity).rows[0]
    assert (row.target, row.actual) == (0.97, pytest.approx(0.9))


def test_updates_by_hand():
    model, sparsity, optimizer = start({"algorithm": "rigl", "sparsity": 0.8})
    sparsity.autoupdate = False
    before = model.weight_mask.clone()
    train_step(model, optimizer, 0)
    assert sparsity.step == 1 and torch.equal(model.weight_mask, before)
    sparsity.update()
    assert not torch.equal(model.weight_mask, before)
    assert_exact_zeros(sparsity, optimizer)


def test_an_update_by_hand_without_a_gradient_leaves_rigl_as_it_is():
    model, sparsity, _ = start({"algorithm": "rigl", "sparsity": 0.8})
    before = model.weight_mask.clone()
    with pytest.warns(
        UserWarning, match=r"weight keeps its topology at step 0: rigl ranks by its dense gradient"
    ):
        sparsity.update()
    sparsity.update()
    assert torch.equal(model.weight_mask, before) and sparsity.updates == 1


def test_parts_of_a_model():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    first, second = rarefy.Static(0.5), rarefy.SET(0.75)
    first.apply(model["a"])
    second.apply(model["b"])
    assert [int((layer.weight != 0).sum()) for layer in model.values()] == [8, 4, 16]


def test_tied_weights_are_one_parameter():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    _, sparsity, optimizer = start(0.5, model)
    assert [p.name for p in sparse_parameters(sparsity)] == ["0.weight"]
    optimizer.zero_grad()
    model(torch.randn(3, 6)).sum().backward()
    optimizer.step()
    assert_exact_zeros(sparsity, optimizer)


def test_two_algorithms_on_one_parameter_are_refused():
    model = nn.Linear(4, 4)
    rarefy.Static(0.5).apply(model)
    with pytest.raises(RarefyError, match="weight has a sparsity algorithm already"):
        rarefy.SET(0.5).apply(model)


def test_one_algorithm_twice_on_like_names_is_refused():
    algorithm = rarefy.Static(0.5)
    algorithm.apply(nn.Linear(4, 4))
    with pytest.raises(RarefyError, match="a second parameter is called weight"):
        algorithm.apply(nn.Linear(4, 4))


def test_groups_that_fit_only_some_weights_leave_the_model_untouched():
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 6))
    with pytest.raises(
        ConfigError, match=r"balance_out_groups: 4 is not allowed; give a divisor of the 6 output features"
    ):
        rarefy.Static(0.5, balance_out_groups=4).apply(model)
    assert "0.weight_mask" not in model.state_dict()
    assert all(layer.weight.all() for layer in model)


def test_apply_takes_models_and_optimizers_only():
    with pytest.raises(RarefyError, match="apply takes a torch module or a torch optimizer, not str"):
        rarefy.Static(0.5).apply("model")


def test_sparse_gradients_are_refused():
    model = nn.Embedding(10, 4, sparse=True)
    rarefy.Static(0.5, param_filter="weight").apply(model)
    with pytest.raises(RarefyError, match="weight has a sparse gradient; build its module with sparse=False"):
        model(torch.tensor([1])).sum().backward()


def test_two_counts_of_the_same_optimizer_are_one():
    model, sparsity, optimizer = start(0.5)
    sparsity.apply(optimizer)
    train_step(model, optimizer, 0)
    assert sparsity.step == 1


def test_an_optimizer_of_other_weights_does_not_count():
    model, sparsity, optimizer = start(0.5)
    other = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    sparsity.apply(other)
    other.step()
    train_step(model, optimizer, 0)
    assert sparsity.step == 1


def test_a_second_optimizer_for_the_same_weights_goes_on_counting():
    model, sparsity, optimizer = start({"algorithm": "set", "sparsity": 0.5, "update": {"freq": 5}})
    train_step(model, optimizer, 0)
    later = torch.optim.AdamW(model.parameters())
    sparsity.apply(later)
    for step in range(1, 5):
        train_step(model, later, step)
    assert (sparsity.step, sparsity.updates) == (5, 2)


def test_a_weight_that_joins_an_optimizer_later_does_not_hold_up_the_count():
    model = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12))
    sparsity = rarefy.SET(0.5)
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.1)
    sparsity.apply(optimizer)
    for step in range(3):
        train_step(model, optimizer, step)
    optimizer.add_param_group({"params": list(model[0].parameters())})
    train_step(model, optimizer, 3)
    assert sparsity.step == 4


def clip_what_is_not_finite(model):
    model.bias.grad[0] = torch.inf
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    model.weight.grad[model.weight_mask] = 1.0


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.weight.grad.add_(1.0),
        lambda model: setattr(model.weight, "grad", torch.ones_like(model.weight)),
        clip_what_is_not_finite,
    ],
    ids=["noise", "assigned", "clipped"],
)
def test_gradients_changed_before_the_step_are_selected_again(change):
    model, sparsity, _ = start(0.5)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsity.apply(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        model(batch(0)).square().sum().backward()
        change(model)
        optimizer.step()
        assert_exact_zeros(sparsity, optimizer)
    assert bool(model.weight[model.weight_mask].isfinite().all())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: {**s, "algorithm": "set"},
            "this sparsity state is of set, not of static; load it into the same algorithm",
        ),
        (lambda s: [s], "this sparsity state is of list, not of static; load it into the same algorithm"),
        (
            lambda s: {"algorithm": "static", "step": 1},
            "lacks dense_gradients, seed, target_sparsity, updates",
        ),
        (
            lambda s: {**s, "dense_gradients": {"fc": torch.ones(1)}},
            "has gradients of fc, which is not sparse here",
        ),
    ],
)
def test_a_foreign_state_is_refused(change, message):
    _, sparsity, _ = start(0.5)
    with pytest.raises(RarefyError, match=message):
        sparsity.load_state_dict(change(sparsity.state_dict()))


def test_masks_of_a_loaded_state_dict_take_over():
    model, sparsity, optimizer = start({"sparsity": 0.5, "seed": 1})
    train_step(model, optimizer, 0)
    other, _, _ = start({"sparsity": 0.5, "seed": 2})
    state = copy.deepcopy(other.state_dict())
    state["weight"] = torch.ones_like(state["weight"])
    model.load_state_dict(state)
    assert torch.equal(model.weight_mask, other.weight_mask)
    assert_exact_zeros(sparsity, optimizer)
    assert int((model.weight != 0).sum()) == 60


def test_loading_an_optimizer_state_prunes_it():
    model, sparsity, optimizer = start(0.5)
    train_step(model, optimizer, 0)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][0]["momentum_buffer"].fill_(1.0)
    optimizer.load_state_dict(state)
    assert_exact_zeros(sparsity, optimizer)


def test_applying_again_to_a_copy_starts_afresh():
    model = small_model()
    rarefy.Static(0.5).apply(model)
    twin = copy.deepcopy(model)
    sparsity = rarefy.Static(0.75)
    sparsity.apply(twin)
    optimizer = torch.optim.AdamW(twin.parameters())
    sparsity.apply(optimizer)
    train_step(twin, optimizer, 0)
    assert sparse_parameters(sparsity)[0].actual_sparsity == 0.75
    assert float((model[0].weight_mask).float().mean()) == 0.5
    assert_exact_zeros(sparsity, optimizer)


def test_a_second_algorithm_on_a_tied_weight_is_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    rarefy.Static(0.5).apply(model["a"])
    with pytest.raises(RarefyError, match="weight has a sparsity algorithm already"):
        rarefy.Static(0.9).apply(model["b"])


def test_custom_algorithms_do_not_take_each_others_state():
    class KeepFirst(rarefy.DynamicSparsityAlgorithm):
        def update_mask(self, weight, mask, sparsity, dense_grad):
            return mask

    class KeepLast(KeepFirst):
        pass

    first, last = KeepFirst(0.5), KeepLast(0.5)
    with pytest.raises(RarefyError, match="this sparsity state is of KeepFirst, not of KeepLast"):
        last.load_state_dict(first.state_dict())


def test_a_built_in_function_may_be_the_initializer():
    layer = nn.Linear(4, 4)
    weight = layer.weight.detach().clone()
    rarefy.Static(0.25, init_method=torch.gt).apply(layer)
    assert torch.equal(layer.weight_mask, weight > 0.25)


def test_a_function_is_not_asked_for_a_million_steps():
    asked = []
    algorithm = rarefy.SET(0.5, update=lambda step: asked.append(step) or step == 7)
    assert algorithm.next_update_step(3) == 7
    assert algorithm.next_update_step(7) is None
    assert len(asked) < 20_000


def test_a_gradient_that_a_closure_changes_leaves_zeros_alone():
    model, sparsity, optimizer = start(0.5)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, model.in_features)).square().sum()
        loss.backward()
        model.weight.grad.add_(1.0)
        return loss

    for _ in range(3):
        optimizer.step(closure)
        assert_exact_zeros(sparsity, optimizer)


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_model_holds_the_algorithm_that_nobody_else_does(compute):
    model = nn.Linear(8, 8)
    rarefy.configure({"sparsity": 0.5, "compute": compute}).apply(model)
    gc.collect()
    model(torch.ones(2, 8)).sum().backward()
    grad = model.weight.grad
    assert grad is not None
    mask = model.get_buffer("weight_mask")
    assert torch.equal(grad.to_dense() != 0 if grad.is_sparse else torch.zeros(8, 8).add(grad) != 0, mask)


def layer_with_a_weight_of_a_model_that_is_gone():
    model = nn.Linear(8, 8)
    rarefy.configure(0.5).apply(model)
    other = nn.Linear(8, 8)
    other.weight = model.weight
    del model
    gc.collect()
    return other


def test_a_weight_that_outlives_its_model_says_so():
    other = layer_with_a_weight_of_a_model_that_is_gone()
    with pytest.warns(RuntimeWarning, match="the model is gone in which it was sparse"):
        other(torch.ones(2, 8)).sum().backward()


def test_a_weight_of_a_model_that_is_gone_may_become_sparse_in_another():
    other = layer_with_a_weight_of_a_model_that_is_gone()
    rarefy.configure(0.75).apply(other)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other(torch.ones(2, 8)).sum().backward()
    assert other.weight.grad is not None and int(other.weight.grad.count_nonzero()) == 16
