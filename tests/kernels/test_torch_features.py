"""What torch offers for any model works for one with compact storage, while its topology changes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import rarefy
from helpers import SIZES_MAY_CHANGE, needs_torch
from rarefy.nn import SparseLinear


def model_of(bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 24, bias=bias), nn.Tanh(), nn.Linear(24, 16, bias=bias))


def prepare(algorithm="rigl", compute="compact", **block):
    model = model_of()
    options = {"algorithm": algorithm, "seed": 1, "compute": compute, "sparsity": 0.75, **block}
    sparsity = rarefy.configure(options)
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def inputs(step):
    return torch.randn(5, 16, generator=torch.Generator().manual_seed(step))


def learn(network, optimizer, step):
    optimizer.zero_grad()
    (network(inputs(step)) - 1).square().mean().backward()
    optimizer.step()


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Counter:
    """A compiler backend that counts the graphs that it is given."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return torch._dynamo.backends.debugging.aot_eager(graph, examples)


def trained(compute, steps, compiled, **block):
    """The model after these steps, and how many graphs had been compiled after each."""
    model, _, optimizer = prepare(compute=compute, **block)
    counter, counts = Counter(), []
    network = torch.compile(model, fullgraph=True, backend=counter) if compiled else model
    for step in range(steps):
        learn(network, optimizer, step)
        counts.append(counter.graphs)
    return model, counts


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
def test_a_compiled_training_loop_with_updates():
    """Two graphs serve: without and with the dense gradient; an update of RigL keeps every shape."""
    update = {"freq": 3}
    model, counts = trained("compact", 9, True, update=update)
    expected, _ = trained("compact", 9, False, update=update)
    assert counts == [1, 1, 2, 2, 2, 2, 2, 2, 2]
    torch.testing.assert_close(model.state_dict(), expected.state_dict())


@needs_torch("2.8", "it does not look at what a compiled graph was made for")
def test_a_compiled_training_loop_recompiles_where_shapes_change_only_under_a_torch_that_must():
    block = {"algorithm": "gmp", "sparsity": [0.5, 0.75, 0.5], "update": {"freq": 3}}
    model, counts = trained("compact", 8, True, **block)
    expected, _ = trained("compact", 8, False, **block)
    torch.testing.assert_close(model.state_dict(), expected.state_dict())
    if SIZES_MAY_CHANGE:
        assert counts == [1] * 8
    else:
        assert counts[2] == 1 and counts[5] == 2 and counts[-1] <= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_default_compiler():
    model, _, optimizer = prepare(update={"freq": 2})
    expected, _, other = prepare(update={"freq": 2})
    network = torch.compile(model, fullgraph=True)
    for step in range(4):
        learn(network, optimizer, step)
        learn(expected, other, step)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=1e-4, atol=1e-6)


# torch 2.6 does not say that it exports, so that the probe of the dense gradient becomes a part of the program.
@needs_torch("2.10", "it cannot export tensors of a class of their own")
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr|.*_probe:UserWarning")
@pytest.mark.parametrize("strict", [True, False])
def test_export(strict):
    model, _, _ = prepare()
    exported = torch.export.export(model.eval(), (inputs(0),), strict=strict)
    torch.testing.assert_close(exported.module()(inputs(1)), model(inputs(1)))
    assert "rarefy.linear" in str(exported.graph)


def test_functional_call_and_gradient():
    model, _, _ = prepare()
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(given):
        return torch.func.functional_call(model, given, (inputs(0),)).square().sum()

    found = torch.func.grad(loss)(parameters)
    model(inputs(0)).square().sum().backward()
    assert set(found) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    for name, parameter in model.named_parameters():
        at = parameter.topology.mask() if name.endswith("weight") else torch.tensor(True)
        torch.testing.assert_close(found[name] * at, parameter.grad * 1)


def test_a_gradient_of_a_functional_gradient():
    model, _, _ = prepare()

    def curvature(network):
        given = {name: value.detach() for name, value in network.named_parameters()}

        def loss(bias):
            return torch.func.functional_call(network, {**given, "0.bias": bias}, (inputs(0),)).tanh().sum()

        def slope(bias):
            return torch.func.grad(loss)(bias).square().sum()

        return torch.func.grad(slope)(given["0.bias"])

    found = curvature(model)
    torch.testing.assert_close(found, curvature(rarefy.finalize(model)))
    assert found.any()


@needs_torch("2.10", "it loses hooks of a weight that a checkpoint saves")
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_with_updates(use_reentrant):
    def through_checkpoint(model):
        return lambda x: checkpoint(model, x.requires_grad_(), use_reentrant=use_reentrant)

    model, _, optimizer = prepare(update={"freq": 2})
    expected, _, other = prepare(update={"freq": 2})
    for step in range(5):
        learn(through_checkpoint(model), optimizer, step)
        learn(expected, other, step)
    assert all(torch.equal(value, expected.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("needed", ["x", "bias", "both"])
def test_second_derivatives(needed, isa):
    layer = SparseLinear(
        torch.rand(4, 6, generator=torch.Generator().manual_seed(0)) < 0.5, dtype=torch.float64
    )
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=needed in ("x", "both"))
    bias = layer.bias.detach().clone().requires_grad_(needed in ("bias", "both"))

    def forward(x, bias):
        return F.linear(x, layer.weight, bias).tanh()

    assert torch.autograd.gradgradcheck(forward, (x, bias))


def test_second_derivatives_in_float32(isa):
    """Those of the kernels, against a dense layer."""
    layer = SparseLinear(torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.3)
    dense, x = layer.to_linear(), torch.randn(7, 40, requires_grad=True)
    found = []
    for one in (layer, dense):
        [slope] = torch.autograd.grad(one(x).tanh().sum(), x, create_graph=True)
        weight = next(one.parameters())
        found.append(torch.autograd.grad(slope.square().sum(), [x, weight]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(
        found[0][1], layer.weight.topology.dense(layer.weight.topology.gather(found[1][1]))
    )


@needs_torch("2.10", "it loses hooks of a weight that a checkpoint saves")
def test_second_derivatives_through_a_checkpoint():
    found = []
    for way in (lambda model, x: model(x), lambda model, x: checkpoint(model, x, use_reentrant=False)):
        model, _, _ = prepare()
        x = inputs(0).requires_grad_()
        [slope] = torch.autograd.grad(way(model, x).sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), model[2].weight)[0])
    assert torch.equal(*found) and found[0].any()


def slopes(model, x, create_graph=False, **options):
    """Gradients of a loss with respect to weights, and what their own squares give."""
    weights = [model[0].weight, model[2].weight]
    found = torch.autograd.grad(x.square().mean(), weights, create_graph=create_graph, **options)
    if not create_graph:
        return [one.detach() for one in found]
    penalty = sum(one.square().sum() for one in found)
    return [*(one.detach() for one in found), *torch.autograd.grad(penalty, weights)]


@needs_torch("2.10", "it loses hooks of a weight that a checkpoint saves")
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_asked_for_through_a_checkpoint(create_graph):
    model, _, _ = prepare()
    x = inputs(0).requires_grad_()
    expected = slopes(model, model(x), create_graph)
    found = slopes(model, checkpoint(model, x, use_reentrant=False), create_graph)
    for one, other in zip(found, expected, strict=True):
        assert type(one) is type(other) and torch.equal(one, other) and one.any()


def test_gradients_of_weights_that_nothing_depends_on():
    model, _, _ = prepare()
    hidden = model[0](inputs(0))
    first, last = torch.autograd.grad(
        hidden.sum(), [model[0].weight, model[2].weight], retain_graph=True, materialize_grads=True
    )
    assert first.any() and not last.any() and last.shape == model[2].weight.shape
    first, last = torch.autograd.grad(
        hidden.sum(), (model[0].weight, model[2].weight), retain_graph=True, allow_unused=True
    )
    assert first.any() and last is None
    [alone] = torch.autograd.grad(hidden.sum(), model[0].weight, torch.tensor(2.0))
    torch.testing.assert_close(alone, 2 * first)
