"""One sparse weight: mask, exact zeros, optimizer state, dense gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from rarefy.errors import ConfigError
from rarefy.filters import candidates
from rarefy.patterns import Pattern
from rarefy.storage.gradients import ActivePlaces, Shortlist
from rarefy.storage.parameter import DenseGradient, SparseParameter


def sparse(module, pattern=None):
    return SparseParameter(next(iter(candidates(module))), pattern or Pattern())


def left_half(shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, : shape[1] // 2] = True
    return mask


def test_the_mask_is_a_persistent_bool_buffer_beside_the_weight():
    layer = nn.Linear(4, 3)
    parameter = sparse(layer)
    assert (parameter.name, parameter.storage.kind) == ("weight", "masked")
    assert parameter.weight is layer.weight and parameter.mask is layer.weight_mask
    assert layer.weight_mask.dtype == torch.bool and bool(layer.weight_mask.all())
    assert list(layer.state_dict()) == ["weight", "bias", "weight_mask"]


def test_a_new_mask_prunes_weight_gradient_and_state():
    layer = nn.Linear(4, 4)
    parameter, optimizer = sparse(layer), torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    kept = layer.weight.detach().clone()
    mask = left_half((4, 4))
    parameter.set_mask(mask, [optimizer])
    state = optimizer.state[layer.weight]
    for tensor in (layer.weight, layer.weight.grad, state["exp_avg"], state["exp_avg_sq"]):
        assert not tensor[~mask].any() and bool((tensor[mask] != 0).all())
    assert torch.equal(layer.weight[mask], kept[mask])
    assert state["step"] == 1 and parameter.actual_sparsity == 0.5


def test_nan_does_not_survive_pruning():
    layer = nn.Linear(4, 4)
    parameter = sparse(layer)
    with torch.no_grad():
        layer.weight.fill_(float("nan"))
    parameter.set_mask(torch.zeros(4, 4, dtype=torch.bool), [])
    assert not layer.weight.any()


def test_a_grown_connection_starts_at_zero():
    layer = nn.Linear(4, 4)
    parameter = sparse(layer)
    parameter.set_mask(left_half((4, 4)), [])
    parameter.set_mask(torch.ones(4, 4, dtype=torch.bool), [])
    assert not layer.weight[:, 2:].any() and bool((layer.weight[:, :2] != 0).all())


def test_the_mask_keeps_its_tensor_and_does_not_alias_the_callers():
    layer = nn.Linear(4, 4)
    parameter, buffer, mask = sparse(layer), layer.weight_mask, left_half((4, 4))
    parameter.set_mask(mask, [])
    assert layer.weight_mask is buffer
    mask.fill_(True)
    assert parameter.actual_sparsity == 0.5


def test_nested_state_is_pruned_and_other_shapes_are_left_alone():
    layer = nn.Linear(4, 6)
    parameter, optimizer = sparse(layer), torch.optim.SGD(layer.parameters(), lr=0.1)
    inner, row, listed = torch.ones(6, 4), torch.ones(4), torch.ones(6, 4)
    optimizer.state[layer.weight] = {"deep": {"inner": inner, "row": row}, "list": [listed, 3], "name": "x"}
    mask = left_half((6, 4))
    parameter.set_mask(mask, [optimizer])
    assert torch.equal(inner.bool(), mask) and torch.equal(listed.bool(), mask) and bool(row.all())


def test_optimizers_that_know_nothing_of_the_weight_are_left_alone():
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam([nn.Parameter(torch.ones(4, 4))])
    sparse(layer).set_mask(left_half((4, 4)), [optimizer])
    assert not optimizer.state


def test_channels_last_weights_keep_their_format():
    conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    parameter = sparse(conv)
    mask = torch.rand(conv.weight.shape) < 0.5
    parameter.set_mask(mask, [])
    assert torch.equal(conv.weight != 0, mask)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_groups_that_do_not_fit_leave_the_module_untouched():
    layer = nn.Linear(4, 3)
    with pytest.raises(ConfigError, match="balance_out_groups: 2 is not allowed"):
        sparse(layer, Pattern(0, 2))
    assert list(layer.state_dict()) == ["weight", "bias"]


MASK = torch.tensor([True, True, False, False])


def accumulate(dense, grad, piece):
    """What a backward pass does to the accumulated gradient of a masked weight."""
    dense.begin(grad)
    grad = piece.clone() if grad is None else grad.add_(piece)
    dense.add(grad, MASK)
    grad.masked_fill_(~MASK, 0)
    dense.seal(grad)
    return grad


def test_micro_batches_add_up_at_every_position():
    dense, pieces, grad = DenseGradient(), torch.randn(3, 4), None
    for piece in pieces:
        grad = accumulate(dense, grad, piece)
    torch.testing.assert_close(dense.take(), pieces.sum(0))
    assert dense.take() is None


@pytest.mark.parametrize("to_none", [True, False])
def test_discarded_gradients_are_forgotten(to_none):
    dense, first, second = DenseGradient(), torch.randn(4), torch.randn(4)
    grad = accumulate(dense, None, first)
    grad = accumulate(dense, None if to_none else grad.zero_(), second)
    assert torch.equal(dense.take(), second)


def test_a_gradient_that_is_zero_by_itself_is_not_forgotten():
    dense, first, second = DenseGradient(), torch.tensor([0.0, 0.0, 3.0, 4.0]), torch.ones(4)
    grad = accumulate(dense, None, first)
    accumulate(dense, grad, second)
    assert dense.take().tolist() == [1.0, 1.0, 4.0, 5.0]


def test_a_gradient_that_was_rewritten_but_not_discarded_is_not_forgotten():
    dense, first, second = DenseGradient(), torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.ones(4)
    grad = accumulate(dense, None, first).mul_(1.0)
    accumulate(dense, grad, second)
    assert dense.take().tolist() == [2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("kind", ["masked", "compact"])
@pytest.mark.parametrize("is_transposed_in_memory", [False, True])
def test_entries_of_the_gradient_are_read_and_written(kind, is_transposed_in_memory):
    layer = nn.Linear(4, 6)
    parameter = sparse(layer)
    mask = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    parameter.set_mask(mask, [])
    parameter.become(kind, [])
    assert parameter.gradient_entries().tolist() == [0.0] * int(mask.sum())
    gradient = torch.where(mask, torch.arange(24.0).view(6, 4), 0.0)
    layer.weight.grad = gradient.t().contiguous().t() if is_transposed_in_memory else gradient.clone()
    parameter.storage.select_gradient(None)
    entries = parameter.gradient_entries()
    assert sorted(entries.tolist()) == sorted(gradient[mask].tolist())
    parameter.set_gradient_entries(entries * 2)
    assert torch.equal(parameter.storage.spread(layer.weight.grad), gradient * 2)
    assert parameter.storage.gradient_is_selected


@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_entries_make_a_gradient_where_there_is_none(kind):
    layer = nn.Linear(4, 6)
    parameter = sparse(layer)
    parameter.set_mask(left_half((6, 4)), [])
    parameter.become(kind, [])
    parameter.set_gradient_entries(torch.arange(12.0))
    assert parameter.storage.spread(layer.weight.grad).sum() == 66
    assert not parameter.storage.spread(layer.weight.grad)[~left_half((6, 4))].any()


def test_what_a_failed_step_was_about_to_use_belongs_to_no_step_without_a_gradient():
    dense = DenseGradient()
    accumulate(dense, None, torch.ones(4))
    dense.close()
    dense.discard()
    assert dense.take() is None


def test_what_a_step_has_used_stays_until_the_step_of_all_weights_is_over():
    dense = DenseGradient()
    accumulate(dense, None, torch.ones(4))
    dense.close()
    dense.used()
    dense.discard()
    assert dense.take().tolist() == [1.0] * 4


def test_a_shortlist_covers_no_group_for_another():
    listed = Shortlist(torch.arange(4), torch.ones(4), [1, 3])
    assert listed.covers([1, 3])
    assert not listed.covers([0, 4])
    assert not listed.covers([2, 3])


def test_active_places_are_those_of_a_mask_with_as_many():
    places = ActivePlaces()
    for mask in ([True, False, False], [False, True, False], [False, False, True]):
        assert places.of(torch.tensor(mask)).tolist() == [mask.index(True)]


def test_active_places_are_those_of_the_mask_whoever_wrote_to_it():
    places = ActivePlaces()
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(5, 7, dtype=torch.bool)
    for shape, density in [((5, 7), 0.5), ((5, 7), 0.5), ((5, 7), 0.0), ((7, 5), 1.0), ((2, 2), 0.5)]:
        if mask.shape == shape:
            mask.data.copy_(torch.rand(shape, generator=generator) < density)
        else:
            mask = torch.rand(shape, generator=generator) < density
        for _ in range(2):
            assert torch.equal(places.of(mask), mask.flatten().nonzero().squeeze(1))
    assert copy.deepcopy(places)._places is None


@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_forward_passes_use_what_is_not_zero_when_another_mask_is_loaded(kind):
    layer = nn.Linear(4, 1, bias=False)
    parameter = sparse(layer)
    parameter.set_mask(torch.tensor([[True, True, True, False]]), [])
    parameter.become(kind, [])
    parameter.set_forward_mask(torch.tensor([[True, False, True, False]]))
    loaded = torch.tensor([[False, True, True, True]])
    parameter.before_load(loaded, [])
    layer.load_state_dict({"weight": torch.tensor([[0.0, 2.0, 0.0, 4.0]]), "weight_mask": loaded})
    parameter.after_load([])
    assert parameter.true_weight().tolist() == [[0.0, 2.0, 0.0, 4.0]]
    assert parameter.dense_weight().tolist() == [[0.0, 2.0, 0.0, 4.0]]
    parameter.show()
    parameter.storage.entries.data.fill_(1.0)
    parameter.prune([])
    parameter.hide()
    assert parameter.dense_weight().tolist() == [[0.0, 1.0, 0.0, 1.0]]
