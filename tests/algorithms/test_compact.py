"""Compact storage under every algorithm: the same masks and numbers as masked storage, and nothing left behind."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import rarefy
from contract_rows import aiming_at, options_of
from helpers import assert_identical, snapshot, sparse_parameters
from rarefy.errors import ConfigError, RarefyError
from rarefy.methods.registry import ALGORITHMS
from rarefy.tensors import SparseWeight

every_algorithm = pytest.mark.parametrize("name", ALGORITHMS)


def layers(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(24, 32, dtype=dtype),
        nn.Tanh(),
        nn.Linear(32, 16, bias=False, dtype=dtype),
        nn.LayerNorm(16, dtype=dtype),
        nn.Linear(16, 8, dtype=dtype),
    )


def prepare(name, compute, model=None, **changes):
    model = layers() if model is None else model
    sparsity = rarefy.configure(
        {"algorithm": name, "seed": 1, "compute": compute, **options_of(name), **changes}
    )
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def learn(model, optimizer, step, micro_batches=1):
    dtype = next(model.parameters()).dtype
    x = torch.randn(12, 24, generator=torch.Generator().manual_seed(step)).to(dtype)
    optimizer.zero_grad()
    for piece in x.chunk(micro_batches):
        ((model(piece) - piece[:, :8]).square().mean() / micro_batches).backward()
    optimizer.step()
    return model(x).detach()


def kinds(sparsity):
    return {parameter.storage.kind for parameter in sparse_parameters(sparsity)}


@every_algorithm
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_masks_and_weights_are_those_of_masked_storage(name, micro_batches):
    runs = []
    for compute in ("masked", "compact"):
        model, sparsity, optimizer = prepare(name, compute)
        outputs = [learn(model, optimizer, step, micro_batches) for step in range(12)]
        runs.append((model.state_dict(), outputs, kinds(sparsity)))
    (masked, expected, _), (compact, found, storage) = runs
    assert storage == {"compact"} and list(masked) == list(compact)
    for key, value in masked.items():
        torch.testing.assert_close(compact[key], value, rtol=1e-9, atol=1e-12, msg=key)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@given(
    name=st.sampled_from(sorted(ALGORITHMS)),
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    target=st.floats(0, 0.99),
    groups=st.booleans(),
)
def test_any_shape_and_sparsity_agrees(name, rows, columns, target, groups):
    balance = {"balance_out_groups": rows} if groups else {}
    changes = aiming_at(name, target)
    states = []
    for compute in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Linear(columns, rows, dtype=torch.float64)
        sparsity = rarefy.configure(
            {"algorithm": name, "seed": 1, "compute": compute, **options_of(name), **changes, **balance}
        )
        sparsity.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsity.apply(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            model(
                torch.arange(2.0 * columns, dtype=torch.float64).view(2, -1) - step
            ).square().sum().backward()
            optimizer.step()
        states.append(model.state_dict())
    assert torch.equal(states[0]["weight_mask"], states[1]["weight_mask"])
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-12)


@every_algorithm
def test_the_optimizer_keeps_its_parameters_and_no_state_of_inactive_connections(name):
    model = layers()
    before = list(model.parameters())
    model, sparsity, optimizer = prepare(name, "compact", model)
    for step in range(5):
        learn(model, optimizer, step)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    for parameter in sparse_parameters(sparsity):
        active = int(parameter.mask.sum())
        assert parameter.weight.shape == parameter.mask.shape and parameter.weight.connections == active
        state = optimizer.state[parameter.weight]
        assert {state[key].connections for key in ("exp_avg", "exp_avg_sq")} == {active}


@every_algorithm
def test_a_new_connection_starts_without_weight_and_state(name):
    model, sparsity, optimizer = prepare(name, "compact")
    learn(model, optimizer, 0)
    parameter = sparse_parameters(sparsity)[0]
    old, layer = parameter.mask, model[0]
    weight = parameter.true_weight()
    first_moment = optimizer.state[layer.weight]["exp_avg"].dense()
    new = torch.rand(old.shape, generator=torch.Generator().manual_seed(5)) < 0.3
    parameter.set_mask(new, [optimizer])
    stays = old & new
    for before, after in (
        (weight, layer.weight.detach().dense()),
        (first_moment, optimizer.state[layer.weight]["exp_avg"].dense()),
    ):
        assert torch.equal(after[stays], before[stays]) and not after[~stays].any()
    assert layer.weight.grad.topology is layer.weight.topology


# ---- going on ------------------------------------------------------------------------------------------------------


STOPS, STEPS = (1, 4, 5), 9


def interrupted(name, compute):
    """A run, its end, and what was saved of it at each of the stops."""
    model, sparsity, optimizer = prepare(name, compute)
    saved = {}
    for step in range(STEPS):
        if step in STOPS:
            saved[step] = pickle.dumps((model.state_dict(), optimizer.state_dict(), sparsity.state_dict()))
        learn(model, optimizer, step)
    return model, optimizer, saved


def resumed(name, compute, saved, stop):
    """The end of the run that goes on from what was saved, perhaps with another storage."""
    model, sparsity, optimizer = prepare(name, compute, layers(seed=7))
    for target, state in zip((model, optimizer, sparsity), pickle.loads(saved[stop]), strict=True):
        target.load_state_dict(state)
    for step in range(stop, STEPS):
        learn(model, optimizer, step)
    return model, optimizer


@every_algorithm
def test_resuming_is_bit_exact(name):
    model, optimizer, saved = interrupted(name, "compact")
    expected = snapshot(model, optimizer)
    for stop in STOPS:
        assert_identical(expected, snapshot(*resumed(name, "compact", saved, stop)))


@every_algorithm
@pytest.mark.parametrize("storages", [("masked", "compact"), ("compact", "masked")])
def test_a_run_goes_on_with_the_other_storage(name, storages):
    first, second = storages
    model, _, saved = interrupted(name, first)
    found = resumed(name, second, saved, 5)[0].state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-9, atol=1e-12, msg=key)


def test_an_optimizer_state_of_another_topology_is_refused():
    model, _, optimizer = prepare("static", "compact")
    learn(model, optimizer, 0)
    _, _, other = prepare("static", "compact", seed=2)
    with pytest.raises(
        RarefyError, match=r"state of 0\.weight belongs to another topology; load the model's"
    ):
        other.load_state_dict(optimizer.state_dict())


def test_the_state_follows_the_connections_when_a_state_dict_brings_another_mask():
    model, _, optimizer = prepare("static", "compact")
    learn(model, optimizer, 0)
    layer = model[0]
    old, moment = layer.weight_mask.clone(), optimizer.state[layer.weight]["exp_avg"].dense()
    other = prepare("static", "masked", sparsity=0.5, seed=2)[0]
    model.load_state_dict(other.state_dict())
    stays = old & other[0].weight_mask
    after = optimizer.state[layer.weight]["exp_avg"].dense()
    assert torch.equal(after[stays], moment[stays]) and not after[~stays].any()
    learn(model, optimizer, 1)


# ---- crossing over -------------------------------------------------------------------------------------------------


def wide(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(256, 384), nn.Tanh(), nn.Linear(384, 8))


def wide_run(compute, sparsity_block, steps, tokens=512):
    model = wide()
    sparsity = rarefy.configure({"algorithm": "gmp", "seed": 1, "compute": compute, **sparsity_block})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsity.apply(optimizer)
    losses, storage = [], []
    for step in range(steps):
        x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss = (model(x) - x[:, :8]).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        storage.append(sparsity.parameters["0.weight"].storage.kind)
    return losses, storage, model


CROSSING = {"sparsity": {"type": "linear", "init": 0.0, "slope": 0.12}, "update": {"freq": 1, "stop": 8}}
compiled_only = pytest.mark.skipif(
    rarefy.kernels.instruction_set() in ("reference", "v2"), reason="auto never leaves masked storage here"
)


@compiled_only
def test_auto_crosses_to_compact_without_a_hiccup():
    masked, _, _ = wide_run("masked", CROSSING, 10)
    auto, storage, model = wide_run("auto", CROSSING, 10)
    assert storage[0] == "masked" and storage[-1] == "compact" and storage == sorted(storage, reverse=True)
    assert auto == pytest.approx(masked, rel=1e-4)
    assert type(model[0].weight) is SparseWeight and "0.weight_mask" in model.state_dict()


@compiled_only
def test_auto_crosses_back_when_the_weight_grows_dense_again():
    block = {"sparsity": [0.95, 0.1], "update": {"freq": 2}}
    masked, _, _ = wide_run("masked", block, 8)
    auto, storage, _ = wide_run("auto", block, 8)
    assert storage == ["compact", "masked", "masked", "compact", "compact", "masked", "masked", "compact"]
    assert auto == pytest.approx(masked, rel=1e-4)


@compiled_only
def test_auto_decides_again_once_it_has_seen_the_tokens():
    _, storage, _ = wide_run("auto", {"sparsity": [0.95, 0.94]}, 2, tokens=512)
    assert storage == ["compact", "compact"]
    _, storage, _ = wide_run("auto", {"sparsity": [0.95, 0.94]}, 2, tokens=1)
    assert storage == ["masked", "masked"]


@compiled_only
def test_auto_sees_an_input_that_is_given_by_name():
    layer = nn.Linear(256, 384)
    sparsity = rarefy.configure({"sparsity": 0.95, "seed": 1})
    sparsity.apply(layer)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-3)
    sparsity.apply(optimizer)
    assert kinds(sparsity) == {"compact"}
    layer(input=torch.ones(1, 256)).sum().backward()
    optimizer.step()
    assert kinds(sparsity) == {"masked"} and sparsity.parameters["weight"].tokens == 1


@compiled_only
@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [(torch.optim.AdamW, "compact"), (torch.optim.Adafactor, "masked"), (None, "masked")],
)
def test_auto_waits_for_an_element_wise_optimizer(optimizer, expected):
    model = wide()
    sparsity = rarefy.configure({"sparsity": 0.95, "seed": 1})
    sparsity.apply(model)
    assert kinds(sparsity) == {"masked"}
    if optimizer is not None:
        sparsity.apply(optimizer(model.parameters(), lr=1e-3))
    assert sparsity.parameters["0.weight"].storage.kind == expected


def start_auto(block):
    model = wide()
    sparsity = rarefy.configure({"seed": 1, **block})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsity.apply(optimizer)
    return model, optimizer, sparsity


def take_steps(model, optimizer, numbers, tokens=1):
    for step in numbers:
        x = torch.randn(tokens, 256, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@compiled_only
def test_auto_goes_on_bit_for_bit_with_the_storage_that_it_had():
    whole, first, second = (start_auto({"sparsity": 0.95}) for _ in range(3))
    take_steps(*whole[:2], range(6))
    take_steps(*first[:2], range(3))
    assert kinds(second[2]) != kinds(first[2])
    for ours, theirs in zip(second, first, strict=True):
        ours.load_state_dict(theirs.state_dict())
    take_steps(*second[:2], range(3, 6))
    assert kinds(second[2]) == kinds(whole[2]) == {"masked"}
    assert_identical(snapshot(*whole[:2]), snapshot(*second[:2]))


@compiled_only
@pytest.mark.parametrize(
    ("saves_what_was_seen", "expected"), [(True, {"masked"}), (False, {"compact", "masked"})]
)
def test_auto_decides_by_what_it_had_seen_before_it_was_resumed(saves_what_was_seen, expected):
    """A state of an earlier version, without what was seen, still loads."""
    block = {"algorithm": "gmp", "sparsity": [0.95, 0.94], "update": {"freq": 4}}
    first, second = start_auto(block), start_auto(block)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        take_steps(*first[:2], range(2), tokens=1)
    state = first[2].state_dict()
    if not saves_what_was_seen:
        del state["activations"]
    second[2].load_state_dict(state)
    if saves_what_was_seen:
        assert {(one.tokens, one.dtype) for one in second[2].parameters.values()} == {(1, torch.bfloat16)}
    take_steps(*second[:2], range(2, 4), tokens=512)
    assert second[2].step == 4 and kinds(second[2]) == expected


# ---- what users do with models -------------------------------------------------------------------------------------


def test_finalize_gives_back_the_same_layers_dense():
    model, _, optimizer = prepare("rigl", "compact")
    for step in range(3):
        learn(model, optimizer, step)
    layer, expected = model[0], model(torch.ones(2, 24, dtype=torch.float64))
    rarefy.finalize(model)
    assert model[0] is layer and type(layer) is nn.Linear and list(layer.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(model(torch.ones(2, 24, dtype=torch.float64)), expected)
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_computes_the_same_and_may_be_made_sparse_again(copied):
    model, _, optimizer = prepare("rigl", "compact")
    learn(model, optimizer, 0)
    other, x = copied(model), torch.ones(3, 24, dtype=torch.float64)
    assert torch.equal(other(x), model(x)) and type(other[0]) is nn.Linear
    learn(model, optimizer, 1)
    _, sparsity, own = prepare("static", "compact", other, init_method="from_zeros", sparsity=0.75)
    learn(other, own, 1)
    assert kinds(sparsity) == {"compact"}


def test_an_average_of_a_static_model_is_that_of_its_dense_twin():
    averages = []
    for compute in ("masked", "compact"):
        model, _, optimizer = prepare("static", compute)
        average = AveragedModel(model)
        for step in range(4):
            learn(model, optimizer, step)
            average.update_parameters(model)
        averages.append(average(torch.ones(2, 24, dtype=torch.float64)))
    torch.testing.assert_close(*averages)


def test_an_average_over_several_topologies_is_that_of_the_dense_weights():
    model, _, optimizer = prepare("rigl", "compact")
    average, total = AveragedModel(model), 0.0
    for step in range(4):
        learn(model, optimizer, step)
        average.update_parameters(model)
        total = total + model[0].weight.detach().dense()
    weight = average.module[0].weight
    assert isinstance(weight, SparseWeight) and weight.connections > model[0].weight.connections
    torch.testing.assert_close(weight.detach().dense(), total / 4)
    torch.testing.assert_close(average.state_dict()["module.0.weight"], total / 4)


def test_a_copy_that_loads_a_state_dict_goes_on():
    model, _, optimizer = prepare("rigl", "compact")
    other = copy.deepcopy(model)
    for step in range(4):
        learn(model, optimizer, step)
    other.load_state_dict(model.state_dict())
    x = torch.ones(2, 24, dtype=torch.float64)
    assert torch.equal(other(x), model(x))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


@pytest.mark.parametrize(
    ("model", "problem"),
    [
        (nn.Sequential(nn.Conv1d(2, 2, 2)), "compact for 0.weight (its module is a Conv1d, not an nn.Linear itself)"),
        (Tied(), "compact for first.weight (it is tied)"),
    ],
)  # fmt: skip
def test_compact_where_it_is_not_possible(model, problem):
    with pytest.raises(ConfigError) as caught:
        rarefy.configure({"sparsity": 0.5, "compute": "compact"}).apply(model)
    message = (
        f"sparsity.compute: {problem} is not allowed; give auto, which takes compact storage where it can"
    )
    assert str(caught.value).startswith(message)
    assert "_mask" not in str(list(model.state_dict()))


def test_hugging_face_linear_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.pytorch_utils import Conv1D
    states = []
    for compute in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(16, 24), nn.Tanh(), Conv1D(8, 16)).double()
        model, sparsity, optimizer = prepare("rigl", compute, model)
        for step in range(6):
            learn(model, optimizer, step)
        assert kinds(sparsity) == {compute}
        states.append(model.state_dict())
    assert type(model[0]) is Conv1D and type(model[0].weight) is SparseWeight
    torch.testing.assert_close(*states)
    assert type(rarefy.finalize(model)[0]) is Conv1D


def wants_dense_gradient(layer):
    return layer.weight._cell.collect is not None


def test_turning_automatic_updates_off_asks_for_dense_gradients_at_once():
    model, sparsity, optimizer = prepare("rigl", "compact", update={"steps": [50]})
    assert not wants_dense_gradient(model[0])
    sparsity.autoupdate = False
    learn(model, optimizer, 0)
    before = model[0].weight_mask.clone()
    sparsity.update()
    sparsity.autoupdate = True
    assert not wants_dense_gradient(model[0]) and not torch.equal(before, model[0].weight_mask)
