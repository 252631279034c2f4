"""Inactive connections are exact zeros in conversions and loaded states too; copies are plain models."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import rarefy
from helpers import assert_exact_zeros, batch, small_model, train_step
from rarefy.algorithms.attachment.keeper import finalize, keepers
from rarefy.errors import RarefyError

EVERY_STEP = {"algorithm": "rigl", "sparsity": 0.75, "drop_fraction": 0.5, "update": {"freq": 1}, "seed": 0}


class Tied(nn.Module):
    """Two layers that share one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x).tanh())


def sparse(model, **changes):
    sparsity = rarefy.configure({**EVERY_STEP, **changes})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return sparsity, optimizer


def masked_pairs(model):
    """Every weight with its mask, looked up in the modules."""
    for module in model.modules():
        for name, mask in module.named_buffers(recurse=False):
            if name.endswith("_mask"):
                yield getattr(module, name.removesuffix("_mask")).detach(), mask


def assert_pruned(model, sparsity=0.75):
    pairs = list(masked_pairs(model))
    assert pairs
    for weight, mask in pairs:
        assert not weight[~mask].any()
        assert 1 - mask.float().mean().item() == pytest.approx(sparsity, abs=0.02)


def assert_state_pruned(state):
    masks = [name for name in state if name.endswith("_mask")]
    assert masks
    for name in masks:
        assert not state[name.removesuffix("_mask")][~state[name]].any()


# ---- averages ----


def test_a_compiled_copy_computes_with_what_was_written_into_it():
    model = small_model()
    sparse(model)
    inputs, twin = batch(0), copy.deepcopy(model)
    for weight, mask in masked_pairs(twin):
        weight[~mask] += 1.0
    plain = small_model()
    plain.load_state_dict({name: value for name, value in twin.state_dict().items() if "mask" not in name})
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(inputs), plain(inputs), atol=1e-6)


def test_an_average_does_not_disturb_the_trained_model():
    results = []
    for with_average in (False, True):
        model = small_model()
        _, optimizer = sparse(model)
        averaged = AveragedModel(model) if with_average else None
        for step in range(4):
            train_step(model, optimizer, step)
            if averaged is not None:
                averaged.update_parameters(model)
                averaged(batch(step))
        results.append(copy.deepcopy(model.state_dict()))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


# ---- copies ----


def by_deepcopy(model):
    return copy.deepcopy(model)


def by_pickle(model):
    return pickle.loads(pickle.dumps(model))


def by_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [by_deepcopy, by_pickle, by_torch_save])
@pytest.mark.parametrize("build", [small_model, Tied])
def test_copies_are_equal_independent_and_plain(duplicate, build):
    model = build()
    sparsity, optimizer = sparse(model)
    train_step(model, optimizer, 0)
    twin = duplicate(model)
    assert torch.equal(twin(batch(1)), model(batch(1)))
    before = copy.deepcopy(twin.state_dict())
    train_step(model, optimizer, 1)
    assert all(torch.equal(before[name], value) for name, value in twin.state_dict().items())
    with torch.no_grad():
        for weight in twin.parameters():
            weight.fill_(1.0)
    twin(batch(2))
    assert all(value.all() for name, value in twin.state_dict().items() if not name.endswith("mask"))
    assert sparsity.step == 2


def test_a_copy_can_become_sparse_anew_with_an_algorithm_of_its_own():
    model = small_model()
    sparse(model)
    twin = copy.deepcopy(model)
    sparsity, optimizer = sparse(twin, algorithm="set", sparsity=0.5)
    train_step(twin, optimizer, 0)
    assert sparsity.step == 1
    assert_pruned(twin, 0.5)
    assert_pruned(model, 0.75)


def test_a_trained_model_takes_no_second_algorithm():
    model = small_model()
    sparse(model)
    with pytest.raises(RarefyError, match="has a sparsity algorithm already"):
        rarefy.configure(0.5).apply(model)


# ---- conversions ----


def test_double_precision_goes_on_training():
    model = small_model()
    sparsity, _ = sparse(model)
    model.double()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    assert all(mask.dtype == torch.bool for _, mask in masked_pairs(model))
    for step in range(3):
        model(batch(step).double()).square().mean().backward()
        assert_exact_zeros(sparsity)
        optimizer.step()
        optimizer.zero_grad()
        assert_exact_zeros(sparsity, optimizer)
    assert_pruned(model)


@pytest.mark.parametrize(
    "convert", [lambda m: m.to(torch.bfloat16), lambda m: m.to("meta"), lambda m: m.half()]
)
def test_conversions_keep_masks_bool_and_in_place(convert):
    model = small_model()
    sparse(model)
    convert(model)
    weight = model[0].weight
    assert model[0].weight_mask.dtype == torch.bool
    assert (model[0].weight_mask.device, model[0].weight_mask.shape) == (weight.device, weight.shape)


def test_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 4, 4))
    sparsity, optimizer = sparse(model)
    model.to(memory_format=torch.channels_last)
    for step in range(3):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(step))
        model(x.contiguous(memory_format=torch.channels_last)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_exact_zeros(sparsity, optimizer)
        assert_pruned(model)
    assert sparsity.step == 3


# ---- state dicts ----


def saved(model):
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_replaces_masks_and_prunes_again(assign):
    source, target = small_model(seed=1), small_model(seed=2)
    sparse(source, sparsity=0.5, seed=9)
    sparsity, optimizer = sparse(target)
    train_step(target, optimizer, 0)
    state = saved(source)
    with torch.no_grad():
        state["0.weight"].fill_(float("nan"))
    target.load_state_dict(state, assign=assign)
    for (weight, mask), (_, expected) in zip(masked_pairs(target), masked_pairs(source), strict=True):
        assert torch.equal(mask, expected) and not weight[~mask].any()
    assert_exact_zeros(sparsity, None if assign else optimizer)


@pytest.mark.parametrize("build", [small_model, Tied])
def test_training_goes_on_after_an_assigning_load(build):
    source, model = build(), build()
    sparse(source, seed=9)
    sparsity, _ = sparse(model)
    model.load_state_dict(saved(source), assign=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    for step in range(3):
        before = [mask.clone() for _, mask in masked_pairs(model)]
        train_step(model, optimizer, step)
        assert_exact_zeros(sparsity, optimizer)
        assert any(
            not torch.equal(old, new) for old, (_, new) in zip(before, masked_pairs(model), strict=True)
        )


def test_loading_leaves_the_callers_dict_alone():
    source, target = small_model(seed=1), small_model(seed=2)
    sparse(source, seed=9)
    sparse(target)
    state = saved(source)
    before = {name: value.clone() for name, value in state.items()}
    target.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in state.items())


def test_loading_into_the_model_resets_nothing_it_does_not_hold():
    model = small_model()
    sparsity, optimizer = sparse(model)
    train_step(model, optimizer, 0)
    result = model.load_state_dict({"0.bias": torch.ones(16)}, strict=False)
    assert "0.weight_mask" in result.missing_keys
    assert_exact_zeros(sparsity, optimizer)


# ---- tied weights ----


def test_tied_weights_are_one_parameter_with_one_mask():
    model = Tied()
    sparsity, optimizer = sparse(model)
    assert list(sparsity.parameters) == ["first.weight"]
    assert [name for name in model.state_dict() if name.endswith("_mask")] == ["first.weight_mask"]
    for step in range(3):
        train_step(model, optimizer, step)
        assert_exact_zeros(sparsity, optimizer)
    assert model.first.weight is model.second.weight
    assert not model.second.weight[~model.first.weight_mask].any()


# ---- finalize ----


@pytest.mark.parametrize("build", [small_model, Tied])
@pytest.mark.parametrize("duplicate", [lambda model: model, by_deepcopy, by_pickle])
def test_finalize_leaves_plain_modules_with_exact_zeros(build, duplicate):
    model = build()
    _, optimizer = sparse(model)
    train_step(model, optimizer, 0)
    expected, plain = model(batch(1)), build()
    twin = duplicate(model)
    zeros = {name: value == 0 for name, value in twin.named_parameters()}
    assert finalize(twin) is twin
    assert list(twin.state_dict()) == list(plain.state_dict())
    assert torch.equal(twin(batch(1)), expected)
    assert all(torch.equal(value == 0, zeros[name]) for name, value in twin.named_parameters())
    for module, other in zip(twin.modules(), plain.modules(), strict=True):
        assert type(module) is type(other) and not list(keepers(module))
        for hooks in (
            "_forward_pre_hooks",
            "_forward_pre_hooks_with_kwargs",
            "_forward_hooks",
            "_state_dict_pre_hooks",
            "_load_state_dict_post_hooks",
        ):
            assert not getattr(module, hooks)
    plain.load_state_dict(twin.state_dict())


def test_finalize_keeps_what_an_average_holds():
    model = small_model()
    _, optimizer = sparse(model)
    averaged = AveragedModel(model)
    for step in range(3):
        train_step(model, optimizer, step)
        averaged.update_parameters(model)
    weight = averaged.module[0].weight.clone()
    finalize(averaged)
    assert torch.equal(averaged.module[0].weight, weight)
    assert not any(name.endswith("_mask") for name in averaged.state_dict())


def test_after_finalize_training_is_dense_and_a_new_algorithm_is_welcome():
    model = small_model()
    sparsity, optimizer = sparse(model)
    train_step(model, optimizer, 0)
    finalize(model)
    assert sparsity.parameters == {}
    for step in range(3):
        train_step(model, optimizer, step)
    assert bool((model[0].weight != 0).all()) and sparsity.step == 1
    sparse(model, sparsity=0.5)
    assert_pruned(model, 0.5)


def test_finalize_of_a_dense_model_changes_nothing():
    model = small_model()
    before = copy.deepcopy(model.state_dict())
    assert finalize(model) is model
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_finalize_keeps_other_peoples_hooks():
    model, calls = small_model(), []
    model[0].register_forward_pre_hook(lambda *_: calls.append(1))
    sparse(model)
    finalize(model)
    model(batch(0))
    assert calls == [1]


def test_functional_calls_see_the_weights_they_were_given():
    model = nn.Linear(4, 4)
    sparse(model)
    twin, given = copy.deepcopy(model), {"weight": torch.ones(4, 4)}
    assert torch.equal(torch.func.functional_call(twin, given, torch.eye(4)), torch.ones(4, 4) + twin.bias)
