"""What torch offers around a model works with a sparse one: compile, export, func, averages, copies."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import rarefy
from helpers import (
    SIZES_MAY_CHANGE,
    assert_exact_zeros,
    assert_identical,
    needs_torch,
    snapshot,
    sparse_parameters,
)

RIGL = {"algorithm": "rigl", "sparsity": 0.75, "drop_fraction": 0.5, "update": {"freq": 2}, "seed": 0}

GRAPHS = {"masked": 1, "compact": 2}  # compact layers have a second graph, which computes the dense gradient


@pytest.fixture(params=["masked", "compact"])
def compute(request):
    """How the weights are stored."""
    return request.param


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 12))


def sparse(model, compute, **changes):
    sparsity = rarefy.configure({**RIGL, "compute": compute, **changes})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return sparsity, optimizer


def inputs(step):
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(step))


def train(forward, optimizer, steps, before_step=lambda: None):
    for step in steps:
        (forward(inputs(step)) - 1).square().mean().backward()
        before_step()
        optimizer.step()
        optimizer.zero_grad()


def masks_of(sparsity):
    return {parameter.name: parameter.mask.clone() for parameter in sparse_parameters(sparsity)}


def inactive_sum(state):
    """The sum of |w| over all inactive connections of a state dict, which has at least two masks."""
    names = [name for name in state if name.endswith("_mask")]
    assert len(names) >= 2
    return sum(float(state[name.removesuffix("_mask")][~state[name]].abs().sum()) for name in names)


# ---- torch.compile ----


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
def test_one_graph_serves_every_step_and_every_topology(compute):
    torch.compiler.reset()
    counter, runs = CompileCounterWithBackend("aot_eager"), []
    for compiled in (False, True):
        model = perceptron()
        sparsity, optimizer = sparse(model, compute)
        first = masks_of(sparsity)
        forward = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        train(forward, optimizer, range(7))
        assert sparsity.step == 7
        assert all(not torch.equal(mask, first[name]) for name, mask in masks_of(sparsity).items())
        assert_exact_zeros(sparsity, optimizer)
        runs.append(snapshot(model, optimizer))
    assert counter.frame_count == GRAPHS[compute]
    assert_identical(*runs)


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
def test_evaluation_is_one_more_graph(compute):
    torch.compiler.reset()
    model = perceptron()
    sparsity, optimizer = sparse(model, compute)
    counter = CompileCounterWithBackend("aot_eager")
    forward = torch.compile(model, fullgraph=True, backend=counter)
    for step in range(3):
        train(forward, optimizer, [step])
        with torch.no_grad():
            torch.testing.assert_close(forward(inputs(9)), model(inputs(9)))
    # Whether a compact weight wants its dense gradient is a part of what is compiled, but not without gradients.
    assert counter.frame_count == GRAPHS[compute] + 1
    assert_exact_zeros(sparsity, optimizer)


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
def test_graphs_of_any_number_of_connections_serve_a_compact_model_that_is_pruned_gradually():
    """The settings that docs/compute.md names for a torch that compiles at every update without, 8 times at most."""
    torch.compiler.reset()
    counter, runs = CompileCounterWithBackend("aot_eager"), []
    growing = {"type": "linear", "init": 0.1, "slope": 0.05}
    gmp = {"algorithm": "gmp", "sparsity": growing, "update": {"freq": 1}, "seed": 0, "compute": "compact"}
    sizes = {"force_parameter_static_shapes": False, "force_nn_module_property_static_shapes": False}
    for compiled in (False, True):
        model, sparsity = perceptron(), rarefy.configure(gmp)
        sparsity.apply(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        sparsity.apply(optimizer)
        forward = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
        with torch._dynamo.config.patch(sizes):
            train(forward, optimizer, range(10))
        runs.append(snapshot(model, optimizer))
    assert counter.frame_count == (1 if SIZES_MAY_CHANGE else 2)
    assert_identical(*runs)


# ---- torch.export ----


# torch 2.6 does not say that it exports, so that the probe of the dense gradient becomes a part of the program.
@needs_torch("2.10", "it cannot export tensors of a class of their own")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr|.*_probe:UserWarning")
def test_an_exported_program_computes_what_the_model_does(compute):
    model = perceptron()
    _, optimizer = sparse(model, compute)
    train(model, optimizer, range(3))
    program = torch.export.export(
        model.eval(), (inputs(0),), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for size in (2, 6):
        torch.testing.assert_close(loaded(inputs(5)[:size]), model(inputs(5)[:size]))


# ---- torch.func ----


def test_functional_call_with_its_own_parameters(compute):
    model = perceptron()
    _, optimizer = sparse(model, compute)
    train(model, optimizer, range(2))
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert torch.equal(torch.func.functional_call(model, state, (inputs(0),)), model(inputs(0)))


def test_functional_call_with_other_parameters_leaves_the_model_alone(compute):
    model = perceptron()
    sparsity, optimizer = sparse(model, compute)
    before = snapshot(model, optimizer)
    ones = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    out = torch.func.functional_call(model, ones, (inputs(0),))
    assert not torch.equal(out, model(inputs(0)))
    assert_identical(before, snapshot(model, optimizer))
    train(model, optimizer, range(2))
    assert_exact_zeros(sparsity, optimizer)


def test_grad_of_a_functional_call_is_the_gradient(compute):
    model = perceptron()
    sparsity, _ = sparse(model, compute)
    weights = {name: value.detach() for name, value in model.named_parameters()}

    def loss(weights):
        return torch.func.functional_call(model, weights, (inputs(0),)).square().mean()

    found = torch.func.grad(loss)(weights)
    model(inputs(0)).square().mean().backward()
    masks = masks_of(sparsity)
    for name, parameter in model.named_parameters():
        mask = masks.get(name, torch.ones_like(parameter, dtype=torch.bool))
        torch.testing.assert_close(found[name][mask], parameter.grad[mask])


# ---- averages and copies ----


def test_an_exponential_average_is_as_sparse_as_the_model(compute):
    model = perceptron()
    sparsity, optimizer = sparse(model, compute, update={"freq": 100})
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(4):
        train(model, optimizer, [step])
        averaged.update_parameters(model)
    assert not torch.equal(averaged(inputs(0)), model(inputs(0)))
    assert inactive_sum(averaged.state_dict()) == 0
    assert all(
        torch.equal(averaged.module.get_submodule(name.rpartition(".")[0]).weight_mask, mask)
        for name, mask in masks_of(sparsity).items()
    )


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_compute_the_same_and_stay_as_they_are(duplicate, compute):
    model = perceptron()
    _, optimizer = sparse(model, compute)
    train(model, optimizer, range(2))
    expected, twin = model(inputs(0)), duplicate(model)
    train(model, optimizer, range(2, 6))
    torch.testing.assert_close(twin(inputs(0)), expected)  # what is pickled is dense and multiplied as such
    assert inactive_sum(twin.state_dict()) == 0
    sparsity, own = sparse(twin, compute, algorithm="set")
    train(twin, own, range(4))
    assert sparsity.step == 4
    assert_exact_zeros(sparsity, own)


# ---- swapped parameters ----


def test_a_parametrization_of_another_parameter(compute):
    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

    for sparse_first in (True, False) if compute == "masked" else (True,):
        model = perceptron()
        if sparse_first:
            sparsity, optimizer = sparse(model, compute)
        parametrize.register_parametrization(model[0], "bias", Doubled())
        if not sparse_first:
            sparsity, optimizer = sparse(model, compute)
        before = masks_of(sparsity)
        train(model, optimizer, range(4))
        assert sparsity.step == 4
        assert all(not torch.equal(mask, before[name]) for name, mask in masks_of(sparsity).items())
        assert_exact_zeros(sparsity, optimizer)
        parametrize.remove_parametrizations(model[0], "bias")
        assert inactive_sum(model.state_dict()) == 0


def test_a_wrapper_that_moves_every_parameter_to_other_memory(compute):
    """As flattening and sharding wrappers do: the same parameter objects, with views of one buffer as their data."""
    model, plain = perceptron(), perceptron()
    sparsity, optimizer = sparse(model, compute)
    other, own = sparse(plain, compute)
    buffers = []

    def move():
        weights = list(model.parameters())
        buffers.append(torch.cat([weight.detach().reshape(-1) for weight in weights]))
        pieces = buffers[-1].split([weight.numel() for weight in weights])
        for weight, piece in zip(weights, pieces, strict=True):
            weight.data = piece.view(weight.shape)

    for step in range(4):
        move()
        train(model, optimizer, [step])
        train(plain, own, [step])
    torch.testing.assert_close(snapshot(model, optimizer), snapshot(plain, own))
    assert_identical(masks_of(sparsity), masks_of(other))
    assert_exact_zeros(sparsity, optimizer)


def test_a_gradient_that_was_put_in_place_by_hand(compute):
    """As wrappers do that reduce or clip gradients in memory of their own."""
    model = perceptron()
    sparsity, optimizer = sparse(model, compute)

    def replace_gradients():
        for weight in model.parameters():
            weight.grad = weight.grad + 1.0

    train(model, optimizer, range(5), replace_gradients)
    assert sparsity.step == 5
    assert_exact_zeros(sparsity, optimizer)
