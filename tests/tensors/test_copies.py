"""Copies, files, conversions and other processes: the weight travels as the dense one would."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref

import pytest
import safetensors.torch
import torch
import torch.multiprocessing
from torch import nn

from rarefy.tensors import Role, SparseWeight, become
from sparse_weights import Pair, inputs, layers, make_sparse, move, whole


def test_a_deep_copy_is_independent():
    model = Pair().sparse
    model(inputs(0)).sum().backward()
    model[0].weight.note = ["kept"]
    copied = copy.deepcopy(model)
    weight, other = copied[0].weight, model[0].weight
    assert type(weight) is SparseWeight and isinstance(weight, nn.Parameter) and weight.role is Role.FREE
    assert weight.topology is other.topology and weight.note == ["kept"] and weight.note is not other.note
    assert torch.equal(weight.grad, other.grad) and weight.grad.entries is not other.grad.entries
    weight.data.zero_()
    assert whole(other).any() and not whole(weight).any()
    (weight @ torch.ones(24)).sum().backward()
    assert type(weight.grad) is SparseWeight


def test_a_deep_copy_keeps_ties():
    model = Pair().sparse
    copied = copy.deepcopy(nn.ModuleList([model[2], model[2]]))
    assert copied[0].weight is copied[1].weight


def test_a_deep_copy_under_inference_mode():
    model = Pair().sparse
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        torch.testing.assert_close(copied(inputs(0)), model(inputs(0)))


@pytest.mark.parametrize("travel", [lambda m: pickle.loads(pickle.dumps(m)), "torch.save"])
def test_files_hold_dense_tensors(travel):
    def saved(value):
        file = io.BytesIO()
        torch.save(value, file)
        file.seek(0)
        return torch.load(file, weights_only=isinstance(value, dict))

    model = Pair().sparse
    go = saved if travel == "torch.save" else travel
    state, other = go(dict(model.state_dict())), go(model)
    assert {type(value) for value in state.values()} == {torch.Tensor}
    assert type(other[0].weight) is nn.Parameter and other[0].weight.requires_grad
    loaded = layers()
    loaded.load_state_dict(state)
    for one in (other, loaded):
        torch.testing.assert_close(one(inputs(0)), model(inputs(0)))


def test_loading_a_dense_state_takes_the_active_connections():
    pair, full = Pair(), layers()
    pair.sparse.load_state_dict(full.state_dict())
    for name, mask in pair.masks.items():
        assert torch.equal(whole(pair.sparse.get_parameter(name)), full.get_parameter(name).detach() * mask)
    other = layers()
    other.load_state_dict(pair.sparse.state_dict())
    assert torch.equal(other[0].weight, whole(pair.sparse[0].weight))


def test_an_assigned_state_dict_is_hooked_again():
    pair = Pair()
    pair.sparse.load_state_dict(Pair().sparse.double().state_dict(), assign=True)
    weight = pair.sparse[0].weight
    (weight @ torch.ones(24, dtype=torch.float64)).sum().backward()
    assert type(weight.grad) is SparseWeight


# ---- memory that is read ----


def test_safetensors_writes_what_is_there(tmp_path):
    model, file = Pair().sparse, tmp_path / "model.safetensors"
    for step in range(3):
        with torch.no_grad():
            model[0].weight.mul_(2) if step else None
        safetensors.torch.save_file(dict(model.state_dict()), file)
        loaded = safetensors.torch.load_file(file)
        assert torch.equal(loaded["0.weight"], whole(model[0].weight))
    safetensors.torch.save_model(model, file)
    other = layers()
    safetensors.torch.load_model(other, file)
    assert torch.equal(other[2].weight, whole(model[2].weight))


@pytest.mark.parametrize(
    "write",
    [
        lambda w: w.mul_(2),
        lambda w: w.copy_(torch.ones(40, 24)),
        lambda w: w[0].fill_(3),
        lambda w: w.zero_(),
        lambda w: torch._foreach_add_([w], 1.0),
        lambda w: move(w, torch.rand(40, 24) < 0.2),
        lambda w: w._cell.values.add_(1),
    ],
)
def test_a_snapshot_is_never_old(write):
    weight = Pair().sparse[0].weight.detach()
    before = weight.untyped_storage()
    assert weight.data_ptr() == before.data_ptr()
    write(weight)
    shown = torch.empty(0).set_(weight.untyped_storage(), 0, (40, 24))
    assert torch.equal(shown, weight.dense())


def test_a_snapshot_is_freed():
    model = Pair().sparse
    cell = model[0].weight._cell
    model[0].weight.untyped_storage()
    assert cell.has_snapshot
    model(inputs(0))
    assert not cell.has_snapshot


def test_memory_of_views_is_that_of_the_snapshot():
    weight = Pair().sparse[0].weight.detach()
    row = weight[2]
    shown = torch.empty(0).set_(row.untyped_storage(), row.storage_offset(), row.shape, row.stride())
    assert torch.equal(shown, weight.dense()[2]) and row.data_ptr() == shown.data_ptr()
    assert row.tolist() == weight.dense()[2].tolist() and (row.numpy() == weight.dense()[2].numpy()).all()
    assert torch.equal(copy.deepcopy(row), pickle.loads(pickle.dumps(row))) and "RearrangedWeight" in repr(
        row
    )


# ---- conversions ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_conversion_keeps_the_object_and_its_hooks(dtype):
    pair = Pair()
    weight, fired = pair.sparse[0].weight, []
    weight.register_hook(lambda grad: fired.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append("accumulated"))
    loss = pair.sparse(inputs(0)).square().mean()
    reference = weakref.ref(weight)
    loss.backward()
    optimizer = torch.optim.SGD(pair.sparse.parameters(), 0.1)
    pair.sparse.to(dtype)
    assert pair.sparse[0].weight is weight is optimizer.param_groups[0]["params"][0] is reference()
    assert weight.dtype == weight.entries.dtype == weight.grad.dtype == dtype and weight.role is Role.MANAGED
    pair.sparse.zero_grad()
    pair.sparse(inputs(1).to(dtype)).square().mean().backward()
    assert fired == ["gradient", "accumulated"] * 2 and type(weight.grad) is SparseWeight
    pair.sparse.float()
    assert weight.dtype == torch.float32 and weight.grad.dtype == torch.float32


def test_conversion_to_what_it_is_changes_nothing():
    weight = Pair().sparse[0].weight
    before = weight.dense()
    layer = nn.Linear(24, 40)
    layer.weight = weight
    loss = layer(inputs(0)).sum()
    layer.float().cpu().share_memory()
    loss.backward()
    assert layer.weight is weight and torch.equal(weight.dense(), before) and weight.is_shared()


def test_a_graph_from_before_a_conversion_is_refused():
    model = Pair().sparse
    loss = model(inputs(0)).sum()
    model.double()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_meta_and_empty():
    model = Pair().sparse
    assert model.to("meta")[0].weight.is_meta
    model = Pair().sparse
    assert model.to_empty(device="cpu")[0].weight.shape == (40, 24)


# ---- dense and sparse, the same object ----


def test_a_parameter_becomes_sparse_and_dense_again():
    layer, optimizer = nn.Linear(6, 4), None
    weight, fired = layer.weight, []
    weight.requires_dense = False
    weight.register_post_accumulate_grad_hook(lambda parameter: fired.append(type(parameter.grad)))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    mask = torch.rand(4, 6) < 0.5
    expected = weight.detach() * mask
    layer(torch.ones(2, 6)).sum().backward()
    make_sparse(weight, mask)
    assert layer.weight is weight is optimizer.param_groups[0]["params"][0] and type(weight) is SparseWeight
    assert torch.equal(whole(weight), expected) and torch.equal(whole(weight.grad), 2.0 * mask)
    layer(torch.ones(2, 6)).sum().backward()
    become(weight, nn.Parameter(weight.dense()))
    assert type(weight) is nn.Parameter and layer.weight is weight and torch.equal(weight.grad, 4.0 * mask)
    assert vars(weight) == {"requires_dense": False} and torch.equal(weight.detach(), expected)
    weight.grad = None
    layer(torch.ones(2, 6)).sum().backward()
    assert fired == [torch.Tensor, SparseWeight, torch.Tensor] and weight.grad.all()


def test_a_graph_from_before_the_change_of_storage_is_refused():
    layer = nn.Linear(6, 4)
    loss = layer(torch.ones(2, 6)).sum()
    make_sparse(layer.weight, torch.ones(4, 6, dtype=torch.bool))
    with pytest.raises(RuntimeError, match="changed its storage, dtype or device after the forward pass"):
        loss.backward()


def test_nothing_keeps_a_weight_alive():
    layer = nn.Linear(6, 4)
    make_sparse(layer.weight, torch.ones(4, 6, dtype=torch.bool))
    layer(torch.ones(2, 6)).sum().backward()
    reference = weakref.ref(layer.weight)
    del layer
    gc.collect()
    assert reference() is None


def test_repr_tells_what_is_stored():
    weight = Pair().sparse[0].weight
    text = repr(weight)
    assert (
        text.startswith("Parameter of SparseWeight(shape=(40, 24), connections=")
        and "requires_grad=True" in text
    )


def write_from_another_process(model, seen):
    with torch.no_grad():
        model[0].weight.fill_(2.0)
        model[2].weight.data.add_(1)
    weight = model[0].weight
    seen.put((type(weight).__name__, isinstance(weight, nn.Parameter)))


@pytest.mark.slow
def test_other_processes_share_the_memory():
    pair = Pair()
    model, before = pair.sparse.share_memory(), whole(pair.sparse[2].weight)
    context = torch.multiprocessing.get_context("spawn")
    seen = context.Queue()
    process = context.Process(target=write_from_another_process, args=(model, seen))
    process.start()
    assert seen.get(timeout=100) == ("SparseWeight", True)
    process.join()
    assert torch.equal(whole(model[0].weight), 2.0 * pair.masks["0.weight"])
    torch.testing.assert_close(whole(model[2].weight), before + 1.0 * pair.masks["2.weight"])
