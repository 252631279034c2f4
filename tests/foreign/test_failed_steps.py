"""Models that go on after a step that raised an error: from a state dict, with other optimizers, or finalized."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import rarefy
from foreign.test_between_steps import METHODS, X, both_storages, fail, prepared, step, step_that_fails

methods = pytest.mark.parametrize("name", METHODS)


@both_storages
@methods
@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("with_masks", [False, True])
def test_a_state_dict_is_loaded_as_it_is(name: str, compute: str, assign: bool, with_masks: bool) -> None:
    ends = []
    for fails in (False, True):
        model, optimizer, sparsity = prepared(name, compute)
        step(model, optimizer)
        saved = copy.deepcopy((model.state_dict(), sparsity.state_dict()))
        expected = model(X).detach()
        if fails:
            step_that_fails(model, optimizer)
        weights = {key: one for key, one in saved[0].items() if with_masks or "mask" not in key}
        model.load_state_dict(weights, strict=with_masks, assign=assign)
        sparsity.load_state_dict(saved[1])
        assert torch.equal(model(X), expected)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsity.apply(optimizer)
        for _ in range(3):
            step(model, optimizer)
        ends.append(model(X).detach())
    assert torch.equal(*ends)


class Attending(nn.Module):
    """Attention uses its output map without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=False)
        self.last = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[sequence, batch, 8] to the same shape."""
        return self.last(self.attention(x, x, x)[0])


@methods
def test_weights_of_an_optimizer_that_did_not_fail_go_on(name: str) -> None:
    torch.manual_seed(0)
    model = Attending()
    x = torch.randn(3, 2, 8)
    sparsity: Any = rarefy.configure({**METHODS[name], "compute": "masked", "seed": 0})
    sparsity.apply(model)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model.last, model.attention)]
    for optimizer in optimizers:
        sparsity.apply(optimizer)
    model(x).square().sum().backward()
    handle = optimizers[0].register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the middle"):
        optimizers[0].step()
    handle.remove()
    model(x).square().sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    assert sparsity.step == 1


def test_a_layer_that_is_finalized_with_a_lost_mask_leaves_the_others_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 16))
    sparsity = rarefy.configure({**METHODS["powerprop"], "compute": "masked", "seed": 0})
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    step(model, optimizer)
    expected = model[1](X).detach()
    step_that_fails(model, optimizer)
    model[0].weight_mask = ~model[0].get_buffer("weight_mask")
    rarefy.finalize(model[0])
    torch.testing.assert_close(model[1](X), expected)


def unpickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def averaged(model: nn.Module) -> nn.Module:
    return AveragedModel(model).module


copies = pytest.mark.parametrize("made", [copy.deepcopy, unpickled, averaged])


@both_storages
@methods
@copies
def test_a_copy_that_is_made_before_a_forward_pass_has_what_is_computed_with(
    name: str, compute: str, made: Any
) -> None:
    model, optimizer, _ = prepared(name, compute)
    step(model, optimizer)
    step_that_fails(model, optimizer)
    copied = made(model)
    torch.testing.assert_close(copied(X), model(X))


@both_storages
@methods
@pytest.mark.parametrize("made", [copy.deepcopy, unpickled, averaged, lambda model: dict(model.state_dict())])
def test_a_copy_that_is_made_within_a_step_does_not_change_it(name: str, compute: str, made: Any) -> None:
    ends = []
    found: list[Any] = []
    for copies in (False, True):
        model, optimizer, _ = prepared(name, compute)
        step(model, optimizer)
        expected = model(X).detach()
        if copies:
            optimizer.register_step_pre_hook(lambda *_, model=model: found.append(made(model)))
        step(model, optimizer)
        if copies and isinstance(found[0], nn.Module):
            torch.testing.assert_close(found[0](X), expected)
        ends.append(model(X).detach())
    assert torch.equal(*ends)
