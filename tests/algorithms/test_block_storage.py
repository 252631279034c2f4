"""Weights of whole blocks in compact storage: what they are called, and what they do where others would not fit."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel

import rarefy
from contract_rows import ROWS, aiming_at, options_of, takes, takes_pattern
from helpers import assert_identical, needs_torch, snapshot, sparse_parameters
from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.methods.registry import ALGORITHMS

BLOCKS = {"pattern": {"block": [8, 16]}}
METHODS = [name for name in ALGORITHMS if takes_pattern(name, BLOCKS["pattern"])]
STOPS = (1, 3, 4)


def layers(dtype=torch.float32, seed=0) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(32, 48, dtype=dtype), nn.Tanh(), nn.Linear(48, 16, dtype=dtype))


def prepare(compute="compact", algorithm="rigl", model=None, **changes) -> tuple[Any, Any, Any]:
    model = layers() if model is None else model
    options = {"algorithm": algorithm, "seed": 1, "compute": compute, **BLOCKS, **options_of(algorithm)}
    if takes(algorithm, "drop_fraction"):
        options["drop_fraction"] = 0.6  # of few blocks, so that some move
    sparsity = rarefy.configure({**options, **changes})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def learn(model, optimizer, steps: Iterable[int] = range(6), autocast=False):
    dtype = next(model.parameters()).dtype
    for step in steps:
        x = torch.randn(10, 32, generator=torch.Generator().manual_seed(step)).to(dtype)
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = model(x)
        (y.float() - x[:, :16].float()).square().mean().backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


def forms(sparsity):
    return [parameter.storage.form for parameter in sparse_parameters(sparsity)]


@pytest.mark.parametrize(
    ("block", "form"),
    [([8, 16], "block"), ([16, 8], "block"), ([2, 4], "compact"), ([8, 4], "compact")],
)
def test_blocks_of_multiples_of_eight_are_stored_as_blocks(block, form):
    _, sparsity, _ = prepare(pattern={"block": block})
    assert forms(sparsity) == [form, form]
    assert {row.storage for row in rarefy.summary(sparsity).rows} == {form}
    assert {parameter.storage.kind for parameter in sparse_parameters(sparsity)} == {"compact"}


@pytest.mark.parametrize("name", METHODS)
def test_masks_and_weights_are_those_of_masked_storage(name):
    states = []
    for compute in ("masked", "compact"):
        model, sparsity, optimizer = prepare(compute, name)
        first = [parameter.mask.clone() for parameter in sparse_parameters(sparsity)]
        states.append(learn(model, optimizer))
        last = [parameter.mask for parameter in sparse_parameters(sparsity)]
        assert all(map(torch.equal, first, last)) == (not ROWS[name].moves)
    torch.testing.assert_close(*states)
    assert forms(sparsity) == ["block", "block"]


def interrupted(name, compute):
    """A run of seven steps, and what was saved of it at each of the stops."""
    model, sparsity, optimizer = prepare(compute, name)
    saved, begin = {}, 0
    for stop in STOPS:
        learn(model, optimizer, range(begin, stop))
        saved[stop] = pickle.dumps((model.state_dict(), optimizer.state_dict(), sparsity.state_dict()))
        begin = stop
    learn(model, optimizer, range(begin, 7))
    return model, optimizer, saved


def resumed(name, compute, saved, stop):
    """The run that goes on from what was saved, perhaps with another storage."""
    model, sparsity, optimizer = prepare(compute, name, layers(seed=7))
    for target, state in zip((model, optimizer, sparsity), pickle.loads(saved[stop]), strict=True):
        target.load_state_dict(state)
    learn(model, optimizer, range(stop, 7))
    return model, optimizer


@pytest.mark.parametrize("name", METHODS)
def test_resuming_is_bit_exact(name):
    model, optimizer, saved = interrupted(name, "compact")
    expected = snapshot(model, optimizer)
    for stop in STOPS:
        assert_identical(expected, snapshot(*resumed(name, "compact", saved, stop)))


@pytest.mark.parametrize("storages", [("masked", "compact"), ("compact", "masked")])
def test_a_run_goes_on_with_the_other_storage(storages):
    first, second = storages
    model, _, saved = interrupted("rigl", first)
    found, _ = resumed("rigl", second, saved, 3)
    torch.testing.assert_close(found.state_dict(), model.state_dict())


@pytest.mark.parametrize("changes", [{"balance_out_groups": 2}, {"balance_in_groups": 2}])
def test_blocks_in_balanced_groups(changes):
    changes = {**changes, "sparsity": 0.5, "pattern": {"block": [8, 8]}}
    states = [learn(*prepare(compute, "set", **changes)[::2]) for compute in ("masked", "compact")]
    torch.testing.assert_close(*states)
    assert forms(prepare("compact", "set", **changes)[1]) == ["block", "block"]


class Wave(DropAndGrow):
    """A custom algorithm that knows nothing of blocks."""

    name = "wave"

    def grow_score(self, weight, dense_grad):
        return (torch.arange(weight.numel()).view_as(weight) * (1.7 + self.updates)).sin()


def test_a_custom_algorithm_a_group_and_a_ragged_distribution():
    def group(compute) -> tuple[Any, Any, Any]:
        model = layers()
        first = Wave(0.5, update={"freq": 2}, seed=1, pattern={"block": [8, 16]}, compute=compute)
        second = rarefy.RigL(0.75, update={"freq": 2}, seed=1, pattern={"block": [16, 16]}, compute=compute)
        sparsity = rarefy.Group({"0.weight": first, "2.weight": second})
        sparsity.apply(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparsity.apply(optimizer)
        return model, sparsity, optimizer

    states = [learn(*group(compute)[::2]) for compute in ("masked", "compact")]
    torch.testing.assert_close(*states)
    assert forms(group("compact")[1]) == ["block", "block"]
    states = [learn(*prepare(compute, distribution="erk")[::2]) for compute in ("masked", "compact")]
    torch.testing.assert_close(*states)


@given(
    name=st.sampled_from(sorted(METHODS)),
    block=st.sampled_from([(8, 8), (8, 24), (16, 8), (40, 16)]),
    down=st.integers(1, 5),
    across=st.integers(1, 5),
    tokens=st.integers(1, 19),
    target=st.floats(0, 0.99),
)
def test_any_shape_and_sparsity_agrees(name, block, down, across, tokens, target):
    changes = aiming_at(name, target)
    states = []
    for compute in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Linear(across * block[1], down * block[0])
        options = {**options_of(name), **changes, "pattern": {"block": list(block)}}
        sparsity = rarefy.configure({"algorithm": name, "seed": 1, "compute": compute, **options})
        sparsity.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sparsity.apply(optimizer)
        for step in range(3):
            optimizer.zero_grad()
            x = torch.randn(tokens, model.in_features, generator=torch.Generator().manual_seed(step))
            (model(x) - step).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states, rtol=1e-4, atol=1e-5)


def test_hugging_face_linear_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.pytorch_utils import Conv1D
    states = []
    for compute in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(Conv1D(48, 32), nn.Tanh(), Conv1D(16, 48)).double()
        model, sparsity, optimizer = prepare(compute, model=model)
        states.append(learn(model, optimizer))
    assert forms(sparsity) == ["block", "block"]
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_dtypes_and_autocast(dtype):
    states = [learn(*prepare(compute, model=layers(dtype))[::2]) for compute in ("masked", "compact")]
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(*states, rtol=tolerance, atol=tolerance)
    if dtype == torch.float32:
        autocast = learn(*prepare("compact")[::2], autocast=True)
        torch.testing.assert_close(autocast["0.bias"], states[0]["0.bias"], rtol=0.1, atol=0.02)


# ---- masks that do not consist of whole blocks ----


def test_a_state_of_other_connections_is_stored_by_connections_until_the_next_update():
    model, sparsity, optimizer = prepare()
    state = model.state_dict()
    state["0.weight_mask"] = torch.eye(48, 32, dtype=torch.bool)
    state["0.weight"] = torch.eye(48, 32)
    model.load_state_dict(state)
    assert forms(sparsity) == ["compact", "block"]
    assert torch.equal(model[0].weight.dense(), torch.eye(48, 32))
    learn(model, optimizer, steps=range(2))
    assert forms(sparsity) == ["block", "block"]


def test_an_average_over_several_topologies_has_all_their_blocks():
    model, _, optimizer = prepare(algorithm="set", sparsity=0.5)
    average: Any = AveragedModel(model)
    total = 0.0
    for step in range(4):
        learn(model, optimizer, steps=[step])
        average.update_parameters(model)
        total = total + model[0].weight.detach().dense()
    weight = average.module[0].weight
    assert weight.topology.has_blocks and weight.connections > model[0].weight.connections
    torch.testing.assert_close(weight.detach().dense(), total / 4)


def test_a_copy_takes_connections_that_are_no_blocks():
    model, _, _ = prepare()
    weight = copy.deepcopy(model)[0].weight
    with torch.no_grad():
        weight.add_(torch.eye(48, 32))
    assert not weight.topology.has_blocks
    torch.testing.assert_close(weight.detach().dense(), model[0].weight.detach().dense() + torch.eye(48, 32))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same(copied):
    model, _, optimizer = prepare()
    learn(model, optimizer, steps=range(3))
    x = torch.randn(5, 32)
    torch.testing.assert_close(copied(model)(x), model(x))


def test_finalize_gives_back_dense_layers():
    model, _, optimizer = prepare()
    learn(model, optimizer, steps=range(3))
    x = torch.randn(5, 32)
    expected, weight = model(x), model[0].weight.detach().dense()
    rarefy.finalize(model)
    assert type(model[0].weight) is nn.Parameter and torch.equal(model[0].weight.detach(), weight)
    torch.testing.assert_close(model(x), expected)


def test_a_layer_of_blocks_that_was_replaced_by_a_dense_one_is_of_blocks_again():
    model, sparsity, optimizer = prepare()
    expected = sparse_parameters(sparsity)[0].dense_weight().clone()
    model[0].weight = nn.Parameter(torch.ones(48, 32))
    optimizer.param_groups[0]["params"][0] = model[0].weight
    storage: Any = sparse_parameters(sparsity)[0].storage
    storage.restore()
    assert forms(sparsity) == ["block", "block"]
    assert torch.equal(storage.mask, expected != 0)


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_a_compiled_model_trains_alike():
    torch.compiler.reset()
    states = []
    for compiled in (False, True):
        model, _, optimizer = prepare()
        forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
        for step in range(5):
            x = torch.randn(10, 32, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            forward(x).square().mean().backward()
            optimizer.step()
        states.append(model.state_dict())
    torch.testing.assert_close(*states)


@pytest.mark.parametrize("score", ["norm", "max"])
def test_blocks_that_are_ranked_in_another_way(score):
    states = []
    for compute in ("masked", "compact"):
        states.append(learn(*prepare(compute, pattern={"block": [8, 8], "score": score})[::2]))
    torch.testing.assert_close(*states)
    model, sparsity, _ = prepare(pattern={"block": [8, 8], "score": score}, init_method="topk")
    weight = layers()[0].weight.detach().unflatten(1, (-1, 8)).unflatten(0, (-1, 8))
    found = weight.abs().amax((1, 3)) if score == "max" else weight.square().sum((1, 3)).sqrt()
    active = model[0].weight_mask.dense().unflatten(1, (-1, 8)).unflatten(0, (-1, 8)).any(3).any(1)
    assert found[active].min() > found[~active].max() and forms(sparsity) == ["block", "block"]
