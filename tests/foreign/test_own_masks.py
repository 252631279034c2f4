"""Modules that have a `weight_mask` of their own: files, copies and pictures tell it from ours."""

# Modules are asked for attributes that their types do not tell.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import rarefy
from rarefy.checkpoint.csr_file import encode_csr, load_csr
from rarefy.checkpoint.mask_names import mask_names
from rarefy.integrations.signed_zeros import active_connections, carry_masks
from rarefy.report.run_data import mask_facts

OWN = torch.ones(16, 16).tril()
KINDS = pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
STORAGES = pytest.mark.parametrize("compute", ["masked", "compact"])


def masked_by_itself(dtype, compute, seed=0):
    layer = nn.Linear(16, 16)
    layer.register_buffer("weight_mask", OWN.to(dtype))
    model = nn.Sequential(layer)
    block = {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 1}, "seed": seed, "compute": compute}
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    return model, sparsity


def assert_own_mask(model, dtype):
    assert torch.equal(model[0].weight_mask, OWN.to(dtype)) and model[0].weight_mask.dtype == dtype


@KINDS
@STORAGES
def test_weights_carry_our_mask(dtype, compute):
    model, sparsity = masked_by_itself(dtype, compute)
    other, its = masked_by_itself(dtype, compute, seed=1)
    taken = [carry_masks(one, ["0.weight"]) for one in (model, other)]
    with torch.no_grad():
        model[0].weight[:4] = 0.0
    mask = sparsity.parameters["0.weight"].mask
    state = model.state_dict()
    assert torch.equal(active_connections(state["0.weight"]), mask)
    del state["0.weight_sparsity_mask"]
    other.load_state_dict(state)
    assert torch.equal(its.parameters["0.weight"].mask, mask) and taken[1] == {"0.weight"}
    assert_own_mask(other, dtype)


@KINDS
@STORAGES
def test_a_finalized_model_loads_what_carried_a_mask(dtype, compute):
    model, _ = masked_by_itself(dtype, compute)
    carry_masks(model, ["0.weight"])
    rarefy.finalize(model)
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_own_mask(model, dtype)


@KINDS
@STORAGES
def test_pictures_show_our_mask(dtype, compute):
    model, sparsity = masked_by_itself(dtype, compute)
    [facts] = mask_facts(model.state_dict(), {})
    assert (facts.name, facts.active) == ("0.weight", int(sparsity.parameters["0.weight"].mask.sum()))


@KINDS
def test_a_file_of_values_and_indices_keeps_both(dtype, tmp_path):
    model, sparsity = masked_by_itself(dtype, "masked")
    mask = sparsity.parameters["0.weight"].mask
    state = {name: value for name, value in model.state_dict().items() if "sparsity" not in name}
    path = tmp_path / "model"
    path.write_bytes(b"".join(encode_csr(state, {"0.weight": mask}, {"mask_again": "0.weight_mask"})))
    loaded = load_csr(path, masks=True)
    assert torch.equal(loaded["0.weight_mask"], OWN.to(dtype))
    assert torch.equal(loaded[mask_names(loaded)["0.weight"]], mask)


@KINDS
@STORAGES
@pytest.mark.parametrize("copied", ["before", "after", "pickled"])
def test_a_copy_that_follows(dtype, compute, copied):
    model, sparsity = masked_by_itself(dtype, compute)
    twin = copy.deepcopy(model) if copied == "after" else pickle.loads(pickle.dumps(model))
    if copied == "before":
        twin = nn.Sequential(nn.Linear(16, 16))
        twin[0].register_buffer("weight_mask", OWN.to(dtype))
    sparsity.track(twin)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 16) * (step + 1)).square().sum().backward()
        optimizer.step()
    mask = sparsity.parameters["0.weight"].mask
    assert not torch.as_tensor(twin[0].weight.detach() * 1.0)[~mask].any()
    assert_own_mask(twin, dtype)
    rarefy.finalize(twin)
    assert_own_mask(twin, dtype)
