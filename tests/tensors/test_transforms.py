"""`torch.func`, forward-mode gradients and functional calls give what they give for the dense model."""

from __future__ import annotations

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from rarefy.tensors import SparseWeight
from sparse_weights import Pair, inputs, whole

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")
x = inputs(0)

TRANSFORMS = {
    "vmap": lambda model: vmap(model)(x),
    "jacrev": lambda model: jacrev(model)(x[0]),
    "jacfwd": lambda model: jacfwd(model)(x[0]),
    "hessian": lambda model: hessian(lambda one: model(one).square().sum())(x[0]),
    "jvp": lambda model: jvp(model, (x,), (torch.ones_like(x),)),
    "vjp": lambda model: vjp(model, x)[1](torch.ones(16, 8)),
    "grad": lambda model: grad(lambda one: model(one).square().sum())(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_the_input(name):
    torch.testing.assert_close(*Pair().run(TRANSFORMS[name]), rtol=1e-4, atol=1e-6)


def parameters_of(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def at_connections(pair, found):
    """Gradients by parameter, of which only those at active connections count."""
    masks = {name: pair.masks.get(name, torch.tensor(True)) for name in found}
    return {name: whole(gradient) * masks[name] for name, gradient in found.items()}


def assert_gradients_agree(find):
    pair = Pair()
    expected, found = pair.run(find)
    torch.testing.assert_close(
        at_connections(pair, found), at_connections(pair, expected), rtol=1e-4, atol=1e-6
    )


def test_gradients_of_each_sample():
    def of_samples(model):
        def loss(parameters, one):
            return functional_call(model, parameters, one[None]).square().sum()

        return vmap(grad(loss), (None, 0))(parameters_of(model), x)

    assert_gradients_agree(of_samples)


def test_jacobians_of_the_parameters():
    assert_gradients_agree(lambda m: jacrev(lambda given: functional_call(m, given, x[:2]))(parameters_of(m)))


def test_a_functional_call_with_other_weights():
    def doubled(model):
        return functional_call(model, {name: one * 2 for name, one in parameters_of(model).items()}, x)

    torch.testing.assert_close(*Pair().run(doubled))


def test_forward_mode_gradients():
    ad = torch.autograd.forward_ad

    def tangent(model):
        with ad.dual_level():
            return ad.unpack_dual(model(ad.make_dual(x, torch.ones_like(x)))).tangent

    torch.testing.assert_close(*Pair().run(tangent))


def test_a_step_that_is_differentiated_through():
    def inner_step(model):
        found = torch.autograd.grad(model(x).square().mean(), list(model.parameters()), create_graph=True)
        pairs = zip(model.named_parameters(), found, strict=True)
        functional_call(
            model, {name: one - 0.1 * g for (name, one), g in pairs}, x
        ).square().mean().backward()
        return [whole(parameter.grad) for parameter in model.parameters()]

    pair = Pair()
    torch.testing.assert_close(*pair.run(inner_step), rtol=1e-4, atol=1e-7)
    assert type(pair.sparse[0].weight.grad) is SparseWeight


def test_a_batch_of_gradients_at_once():
    seeds = torch.eye(16 * 8).view(128, 16, 8)

    def batched(model):
        given = inputs(0).requires_grad_()
        wanted = [given, *model.parameters()]
        return torch.autograd.grad(model(given), wanted, seeds, is_grads_batched=True)

    pair = Pair()
    expected, found = pair.run(batched)
    masks = [
        torch.tensor(True),
        *(pair.masks.get(n, torch.tensor(True)) for n, _ in pair.dense.named_parameters()),
    ]
    for one, other, mask in zip(expected, found, masks, strict=True):
        torch.testing.assert_close(whole(other) * mask, one * mask, rtol=1e-4, atol=1e-6)
