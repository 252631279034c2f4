"""What is kept for connections beside the weight: an algorithm's numbers, and what forward passes do not see."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import nn

from rarefy.filters import candidates
from rarefy.patterns import Pattern
from rarefy.storage.connection_state import ForwardSet
from rarefy.storage.parameter import SparseParameter


def sparse(module: nn.Module) -> SparseParameter:
    return SparseParameter(next(iter(candidates(module))), Pattern())


@pytest.mark.parametrize("kind", ["masked", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_numbers_of_connections_follow_them_and_begin_anew_elsewhere(
    kind: Literal["masked", "compact"], dtype: torch.dtype
) -> None:
    layer = nn.Linear(8, 6, bias=False).to(dtype)
    parameter = sparse(layer)
    generator = torch.Generator().manual_seed(0)
    old, new, last = (torch.rand(6, 8, generator=generator) < 0.5 for _ in range(3))
    parameter.set_mask(old, [])
    parameter.become(kind, [])
    parameter.start_state({"first": 1.5, "sum": 0.0})
    numbers = {
        name: torch.randn(6, 8, dtype=parameter.state.entries[name].dtype) for name in ("first", "sum")
    }
    parameter.store_state({name: tensor.clone() for name, tensor in numbers.items()})
    if kind == "masked":
        # As methods do that treat all entries alike.
        parameter.state.entries["first"] += ~old
    stays = old
    for mask in (new, last):
        parameter.set_mask(mask, [])
        stays = stays & mask
        for name, begin in (("first", 1.5), ("sum", 0.0)):
            assert torch.equal(parameter.dense_state()[name], numbers[name].where(stays, begin))
    parameter.after_load([])
    assert torch.equal(parameter.dense_state()["sum"], numbers["sum"].where(stays, 0.0))


@pytest.mark.parametrize("kind", ["masked", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_what_forward_passes_leave_out_comes_back_bit_by_bit(
    kind: Literal["masked", "compact"], dtype: torch.dtype
) -> None:
    layer = nn.Linear(8, 6, bias=False).to(dtype)
    with torch.no_grad():
        layer.weight[0, :4] = torch.tensor([float("nan"), -0.0, 0.0, float("inf")])
    parameter = sparse(layer)
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 5:] = False
    parameter.set_mask(mask, [])
    parameter.become(kind, [])
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    before = parameter.dense_weight().clone()
    used = mask & (torch.arange(8) % 2 == 0)
    parameter.set_forward_mask(used)
    assert torch.equal(parameter.dense_weight().view(word), before.where(used, 0.0).view(word))
    assert torch.equal(parameter.true_weight().view(word), before.view(word))
    parameter.show()
    assert torch.equal(parameter.dense_weight().view(word), before.view(word))


@pytest.mark.parametrize("kind", ["masked", "compact"])
def test_within_a_step_the_true_weight_is_the_weight_itself(kind: Literal["masked", "compact"]) -> None:
    parameter = sparse(nn.Linear(8, 6, bias=False))
    parameter.become(kind, [])
    before = parameter.true_weight()
    parameter.set_forward_mask(torch.arange(8).expand(6, 8) < 4)
    parameter.show()
    assert parameter.forward.hidden is not None
    assert torch.equal(parameter.true_weight(), before)
    saved = parameter.saved_connections()
    parameter.hide()
    assert torch.equal(saved["aside"], parameter.saved_connections()["aside"])
    assert int(saved["aside"].count_nonzero()) == 24


def test_values_that_are_aside_are_not_taken_aside_again() -> None:
    forward = ForwardSet()
    weight = torch.tensor([1.0, 2.0])
    forward.hide(weight)
    assert not forward.is_hiding
    forward.hidden = torch.tensor([True, False])
    for _ in range(2):
        forward.hide(weight)
        assert weight.tolist() == [0.0, 2.0]
    forward.show(weight)
    assert weight.tolist() == [1.0, 2.0]


@pytest.mark.parametrize("kind", ["masked", "compact"])
@pytest.mark.parametrize("strict", [True, False])
def test_loading_the_same_model_leaves_the_values_aside(
    kind: Literal["masked", "compact"], strict: bool
) -> None:
    layer = nn.Linear(8, 6, bias=False)
    parameter = sparse(layer)
    parameter.set_mask(torch.arange(8).expand(6, 8) < 6, [])
    parameter.become(kind, [])
    before = parameter.true_weight()
    parameter.set_forward_mask(torch.arange(8).expand(6, 8) < 4)
    used = parameter.dense_weight().clone()
    # A state dict without a mask says nothing of the topology, and nobody hears of it before.
    if strict:
        parameter.before_load(parameter.mask.clone(), [])
    layer.load_state_dict(
        {"weight": used, **({"weight_mask": parameter.mask} if strict else {})}, strict=strict
    )
    parameter.after_load([])
    assert torch.equal(parameter.dense_weight(), used)
    assert torch.equal(parameter.true_weight(), before)
