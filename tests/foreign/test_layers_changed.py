"""Layers that other code changes after or before sparsity was applied: followed, or refused in one line."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import rarefy
from foreign.networks import NEEDS_NO_DEFAULT_DEVICE
from rarefy.errors import ConfigError, RarefyError


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))


def applied(model, algorithm="static", **block):
    update = {} if algorithm == "static" else {"update": {"freq": 2}}
    base = {"algorithm": algorithm, "sparsity": 0.9, "seed": 0, "compute": "masked"}
    sparsity = rarefy.configure({**base, **update, **block})
    sparsity.apply(model)
    return sparsity


def train(model, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(16, 64)) - 1).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
def test_a_parametrization_before_is_followed(algorithm):
    model = network()
    parametrizations.spectral_norm(model[0])
    sparsity = applied(model, algorithm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    train(model, optimizer, 5)
    assert (model[0].weight == 0).float().mean() >= 0.899
    assert not model(torch.randn(2, 64)).isnan().any()
    assert rarefy.summary(sparsity).actual_sparsity == pytest.approx(0.9, abs=1e-3)


def remove_at_once(layer):
    prune.random_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")


@pytest.mark.parametrize(
    "wrap",
    [
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        remove_at_once,
    ],
)
@pytest.mark.parametrize("is_followed", [True, False])
def test_what_takes_the_weight_away_afterwards_is_refused(wrap, is_followed):
    model = network()
    sparsity = applied(model, param_filter="0.weight")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if is_followed:
        sparsity.apply(optimizer)
    wrap(model[0])
    with pytest.raises(RarefyError, match=r"weight of a Linear was sparse.*before sparsity.apply\(model\)"):
        train(model, optimizer, 1) if is_followed else sparsity.apply(optimizer)


def as_attribute(layer, leaf):
    vars(layer)[leaf] = getattr(layer, leaf).detach() + 0


def as_property(layer, leaf):
    own = getattr(layer, leaf)
    layer.__class__ = type("Scaled", (nn.Linear,), {leaf: property(lambda _: own * 1)})


@pytest.mark.parametrize("leaf", ["weight", "weight_mask"])
@pytest.mark.parametrize("hide", [as_attribute, as_property])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_what_hides_a_weight_or_its_mask_is_refused(compute, hide, leaf):
    model = nn.Sequential(nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = rarefy.Static(0.5, compute=compute)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    hide(model[0], leaf)
    with pytest.raises(
        RarefyError, match="was sparse and is no parameter of it any more, or its mask is gone"
    ):
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()


def test_pruned_by_torch_before_is_followed_and_its_removal_is_refused():
    model = network()
    prune.l1_unstructured(model[0], "weight", 0.8)
    sparsity = applied(model, init_method="topk")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    train(model, optimizer)
    model(torch.randn(1, 64))
    assert (model[0].weight == 0).float().mean() >= 0.9
    prune.remove(model[0], "weight")
    with pytest.raises(RarefyError, match=r"prune\.remove was called"):
        train(model, optimizer, 1)


class Causal(nn.Linear):
    """Output i sees inputs before i only, by a mask of its own."""

    def __init__(self, size, dtype):
        super().__init__(size, size)
        self.register_buffer("weight_mask", torch.ones(size, size).tril(-1).to(dtype))

    def forward(self, x):
        return nn.functional.linear(x, self.weight * self.weight_mask, self.bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("algorithm", ["static", "set"])
def test_a_mask_of_the_modules_own_is_not_touched(dtype, algorithm):
    model = nn.Sequential(Causal(64, dtype))
    own = model[0].weight_mask.clone()
    sparsity = applied(model, algorithm)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    train(model, optimizer)
    assert torch.equal(model[0].weight_mask, own)
    assert not model[0].weight[~model[0].weight_sparsity_mask].any()
    assert int(model[0].weight_sparsity_mask.sum()) == 410
    model.load_state_dict(model.state_dict())
    jacobian = torch.autograd.functional.jacobian(model, torch.zeros(64))
    assert not jacobian.triu().any() and jacobian.any()
    rarefy.finalize(model)
    assert torch.equal(model[0].weight_mask, own) and not hasattr(model[0], "weight_sparsity_mask")


@pytest.mark.parametrize("in_a_group", [False, True])
def test_a_layer_that_is_replaced_leaves_the_summary(in_a_group):
    model = network()
    entry = {"algorithm": "set", "sparsity": 0.9, "seed": 0, "update": {"freq": 2}, "compute": "masked"}
    sparsity = rarefy.configure([{**entry, "param_filter": "0.*weight"}, entry] if in_a_group else entry)
    sparsity.apply(model)
    model[2] = nn.Linear(128, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    train(model, optimizer)
    assert [row.name for row in rarefy.summary(sparsity).rows] == ["0.weight"]


def test_a_layer_stays_where_its_model_is_not_known_any_more():
    layer = nn.Linear(64, 64)
    sparsity = applied(nn.ModuleList([layer]))
    assert [row.name for row in rarefy.summary(sparsity).rows] == ["0.weight"]


def test_lazy_modules_and_the_meta_device_are_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"0\.weight is lazy.*seen a batch; call it once before"):
        applied(nn.Sequential(nn.LazyLinear(8)))
    with torch.device("meta"):
        model = network()
    with pytest.raises(ConfigError, match=r"0\.weight is on the meta device.*to_empty"):
        applied(model)


@NEEDS_NO_DEFAULT_DEVICE
def test_a_default_device_elsewhere_changes_nothing():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 64)
    torch.set_default_device("meta")
    try:
        sparsity = applied(model, "set")
        sparsity.apply(optimizer)
        for _ in range(2):
            model(x).square().mean().backward()
            optimizer.step()
    finally:
        torch.set_default_device(None)
    assert sparsity.updates == 2 and int(model[0].weight_mask.sum()) == 819
    assert not model[0].weight[~model[0].weight_mask].any()


def test_hooks_without_keywords_work_as_quantization_calls_them():
    """Tools that put another module in a layer's place register its hooks anew, without keywords."""
    model = network()
    applied(model)
    hook = next(iter(model[0]._forward_pre_hooks.values()))
    other = nn.Linear(64, 128)
    other.register_forward_pre_hook(hook)
    assert other(torch.randn(2, 64)).shape == (2, 128)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("compute", ["masked", "compact", "auto"])
@pytest.mark.parametrize("algorithm", ["static", "set"])
def test_layers_that_a_quantisation_exchanges(algorithm, compute):
    def prepared(model):
        model.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
        return torch.ao.quantization.prepare_qat(model.train(), inplace=True)

    if compute != "compact":  # which takes nothing but an nn.Linear
        model = prepared(network())
        sparsity = applied(model, algorithm, compute=compute)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsity.apply(optimizer)
        train(model, optimizer)
        assert not model[0].weight[~model[0].weight_mask].any()
        quantised = torch.ao.quantization.convert(model.eval())
        assert (quantised[0].weight().dequantize() == 0).float().mean() >= 0.899
    model = network()
    sparsity = applied(model, algorithm, compute=compute)
    prepared(model)
    with pytest.raises(
        RarefyError, match=r"0\.weight was sparse and belongs to another module .*prepare_qat"
    ):
        sparsity.apply(torch.optim.SGD(model.parameters(), lr=0.1))
