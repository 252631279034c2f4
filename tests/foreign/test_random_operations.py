"""Random sequences of what other code does to a model, in each storage, against a dense model masked by hand.

The dense model takes the same operations. After each of its steps its masked weights, gradients and optimizer states
are multiplied by the mask, which is all that a sparse weight may do differently.
"""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim

import rarefy
from contract_rows import options_of
from foreign.more_operations import LOUD_TOO, QUIET_TOO, load_an_unpickled_copy, put_zeros
from foreign.operations import (
    LOUD,
    QUIET,
    Operation,
    Side,
    fill_the_state_dict,
    load_a_changed_copy,
    write_the_state_dict,
)

# torch's own, where the first jvp loads its rules.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit"),
    # A gradient may be forgotten in the step before an update.
    pytest.mark.filterwarnings("ignore:.* keeps its topology:UserWarning"),
]

SPARSE = ("0.weight", "2.weight")
EVERY_QUIET = [*QUIET, *QUIET_TOO]
EVERY_LOUD = [*LOUD, *LOUD_TOO]
NEWER: list[dict[str, object]] = [
    *({"algorithm": name, **options_of(name)} for name in ("mest", "movement", "granet", "srigl", "ac_dc")),
    {"algorithm": "set", "sparsity": 0.5, "update": {"freq": 2}, "pattern": "fan_out"},
    {
        "algorithm": "rigl",
        "sparsity": 0.5,
        "update": {"freq": 2},
        "pattern": {"n": 2, "m": 4, "transposable": True},
    },
]
TOP_KAST = {"algorithm": "top_kast", "sparsity": 0.5, "forward_sparsity": 0.75, "update": {"freq": 2}}
# Its state dict has other values than its weight: written to, it is an error; a copy's has the values of a weight.
OF_STATE_DICTS = (write_the_state_dict, fill_the_state_dict, load_a_changed_copy, load_an_unpickled_copy)


# ---- the two models side by side ----


def sides(algorithm: str, storage: str, seed: int) -> tuple[Side, Side]:
    block: dict[str, object] = {"algorithm": algorithm, "sparsity": 0.5}
    if algorithm != "static":
        block["update"] = {"freq": 2}
    return sides_of(block, storage, seed)


def sides_of(block: dict[str, object], storage: str, seed: int) -> tuple[Side, Side]:
    """The sparse model and the dense one that is masked by hand."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    dense = Side(copy.deepcopy(model), optim.SGD(model.parameters(), lr=1.0))
    sparsity = rarefy.configure({**block, "compute": storage, "seed": seed})
    sparsity.apply(model)
    sparse = Side(model, dense.optimizer, sparsity)
    for side in (sparse, dense):
        side.take_optimizer("adam")
    hold(dense, masks_of(sparse))
    hide(dense, hidden_of(sparse))
    return sparse, dense


def masks_of(sparse: Side) -> dict[str, Tensor]:
    assert sparse.sparsity is not None
    return {name: parameter.mask.clone() for name, parameter in sparse.sparsity.parameters.items()}


def hold(dense: Side, masks: dict[str, Tensor]) -> None:
    """What a sparse weight is: zero where its mask says so, and so are its gradient and its optimizer's state."""
    for name, mask in masks.items():
        weight = dense.model.get_parameter(name)
        held = [weight.data, *([] if weight.grad is None else [weight.grad])]
        held += [
            value
            for value in dense.optimizer.state.get(weight, {}).values()
            if isinstance(value, Tensor) and value.shape == weight.shape
        ]
        for tensor in held:
            tensor.mul_(mask)


def hidden_of(sparse: Side) -> dict[str, Tensor]:
    """Connections that forward passes do not use between steps, though they are trained."""
    assert sparse.sparsity is not None
    found = {}
    for name, parameter in sparse.sparsity.parameters.items():
        if parameter.forward.hidden is not None:
            found[name] = parameter.storage.spread(parameter.forward.hidden).bool()
    return found


def hide(dense: Side, hidden: dict[str, Tensor]) -> None:
    dense.aside = {}
    for name, mask in hidden.items():
        weight = dense.model.get_parameter(name).data
        dense.aside[name] = torch.where(mask, weight, 0.0)
        weight.masked_fill_(mask, 0.0)


def show(dense: Side, hidden: dict[str, Tensor]) -> None:
    """The values back, but where others were written in the meantime."""
    for name, mask in hidden.items():
        weight = dense.model.get_parameter(name).data
        weight.copy_(torch.where(mask & (weight == 0), dense.aside[name], weight))


def hold_gradients(dense: Side, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        grad = dense.model.get_parameter(name).grad
        if grad is not None:
            grad.mul_(mask)


def backward(side: Side, x: Tensor) -> None:
    side.optimizer.zero_grad()
    side.model(x).square().mean().backward()


def check(sparse: Side, dense: Side, masks: dict[str, Tensor], x: Tensor) -> None:
    assert sparse.sparsity is not None
    for name, parameter in sparse.sparsity.parameters.items():
        found = parameter.dense_weight()
        torch.testing.assert_close(found, dense.model.get_parameter(name).detach(), rtol=1e-9, atol=1e-11)
        assert (found[~masks[name]] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(sparse.model(x), dense.model(x), rtol=1e-9, atol=1e-11)


def train(sparse: Side, dense: Side, rounds: list[tuple[Operation | None, Operation | None]]) -> None:
    """Trains both; each round has an operation before its forward pass and one before its optimizer's step."""
    for number, (before, between) in enumerate(rounds):
        x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        masks = masks_of(sparse)
        hidden = hidden_of(sparse)
        for side in (sparse, dense):
            if before is not None:
                before(side, torch.Generator().manual_seed(number))
            backward(side, x)
        hold_gradients(dense, masks)
        for side in (sparse, dense):
            if between is not None:
                between(side, torch.Generator().manual_seed(number))
        hold_gradients(dense, masks)
        show(dense, hidden)
        for side in (sparse, dense):
            side.optimizer.step()
        hold(dense, masks)  # what was written to an inactive connection is gone before it may become active
        masks = masks_of(sparse)
        hold(dense, masks)
        hide(dense, hidden_of(sparse))
        check(sparse, dense, masks, x)


@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
@pytest.mark.parametrize("storage", ["masked", "compact", "auto"])
@settings(max_examples=20, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(st.none() | st.sampled_from(EVERY_QUIET), st.none() | st.sampled_from(EVERY_LOUD)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 3),
)
def test_the_result_is_that_of_a_dense_model_masked_by_hand(algorithm, storage, rounds, seed):
    sparse, dense = sides(algorithm, storage, seed)
    assert set(masks_of(sparse)) == set(SPARSE)
    train(sparse, dense, rounds)


@settings(max_examples=40, deadline=None)
@given(
    block=st.sampled_from(NEWER),
    storage=st.sampled_from(["masked", "compact"]),
    rounds=st.lists(
        st.tuples(st.none() | st.sampled_from(EVERY_QUIET), st.none() | st.sampled_from(EVERY_LOUD)),
        min_size=2,
        max_size=6,
    ),
    seed=st.integers(0, 3),
)
def test_the_same_of_methods_and_patterns_that_came_later(block, storage, rounds, seed):
    train(*sides_of(block, storage, seed), rounds)


@settings(max_examples=20, deadline=None)
@given(
    storage=st.sampled_from(["masked", "compact"]),
    rounds=st.lists(
        st.tuples(
            st.none() | st.sampled_from([one for one in EVERY_QUIET if one not in OF_STATE_DICTS]),
            st.none() | st.sampled_from([one for one in EVERY_LOUD if one not in OF_STATE_DICTS]),
        ),
        min_size=2,
        max_size=6,
    ),
    seed=st.integers(0, 3),
)
def test_the_same_where_forward_passes_use_a_part(storage, rounds, seed):
    sparse, dense = sides_of(TOP_KAST, storage, seed)
    assert set(hidden_of(sparse)) == set(SPARSE)
    train(sparse, dense, rounds)


@pytest.mark.parametrize("operation", EVERY_QUIET, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_each_operation_that_keeps_zeros(storage, operation):
    sparse, dense = sides("set", storage, 0)
    train(sparse, dense, [(None, None), (operation, None), (None, None), (operation, None), (None, None)])


@pytest.mark.parametrize("operation", EVERY_LOUD, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_each_operation_that_writes_everywhere(storage, operation):
    sparse, dense = sides("set", storage, 0)
    train(sparse, dense, [(None, None), (None, operation), (None, None), (None, operation), (None, None)])


@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_a_dense_gradient_that_somebody_put_there_is_what_an_update_takes(storage):
    sparse, dense = sides("mest", storage, 0)
    train(sparse, dense, [(None, None), (None, put_zeros), (None, None), (None, put_zeros), (None, None)])


def test_a_weight_that_is_not_held_is_noticed():
    """The comparison itself: another value at an active connection, and one at an inactive connection."""
    sparse, dense = sides("static", "masked", 0)
    masks = masks_of(sparse)
    x = torch.ones(1, 20, dtype=torch.float64)
    check(sparse, dense, masks, x)
    for active in (True, False):
        place = tuple((masks["0.weight"] == active).nonzero()[0].tolist())
        before = sparse.model[0].weight.data[place].item()
        sparse.model[0].weight.data[place] = 7.0
        with pytest.raises(AssertionError):
            check(sparse, dense, masks, x)
        sparse.model[0].weight.data[place] = before
