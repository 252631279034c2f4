"""Nested values survive the way through JSON exactly."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.checkpoint.nested import TAG, join, split

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
TENSORS = st.lists(st.floats(width=32), max_size=4).map(torch.tensor)
KEYS = st.text() | st.just(TAG) | st.integers() | st.booleans() | st.none()
NESTED = st.recursive(
    SCALARS | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
    ),
    max_leaves=20,
)


def round_trip(value):
    skeleton, tensors = split(value)
    return join(json.loads(json.dumps(skeleton, allow_nan=False)), tensors)


def same(a, b) -> bool:
    """Equal in type and value, NaN and the sign of zero included."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a.items()), list(b.items()))
    return a == b


@settings(deadline=None)
@given(NESTED)
def test_round_trip_is_exact(value):
    assert same(round_trip(value), value)


@pytest.mark.parametrize(
    "value", [float("inf"), float("-inf"), float("nan"), -0.0, 2**100, True, (), [], {}, ((),)]
)
def test_values_that_json_would_change(value):
    assert same(round_trip(value), value)


def test_keys_keep_their_type_and_order():
    value = {2: "b", 1: "a", "1": "c", None: "d", (3, 4): "e", 1.5: "f"}
    assert same(round_trip(value), value)


def test_tensors_are_named_after_their_place():
    skeleton, tensors = split({"state": {0: {"exp_avg": torch.ones(2)}}, "list": [torch.zeros(1)]})
    assert list(tensors) == ["state.0.exp_avg", "list.0"]
    assert skeleton["list"] == [{TAG: "tensor", "name": "list.0"}]


def test_names_never_clash():
    value = {
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1)},
        "": torch.ones(2),
        "__metadata__": torch.ones(3),
    }
    tensors = split(value)[1]
    assert len(tensors) == 4 and not {"", "__metadata__"} & tensors.keys()
    assert same(round_trip(value), value)


def test_a_lone_tensor_has_a_name_too():
    assert same(round_trip(torch.ones(2)), torch.ones(2))


def test_the_same_view_is_stored_once_and_shared_afterwards():
    weight = torch.nn.Parameter(torch.randn(3, 2))
    value = {"embedding": weight, "head": weight.detach(), "transposed": weight.detach().T}
    assert list(split(value)[1]) == ["embedding", "transposed"]
    joined = round_trip(value)
    assert joined["embedding"] is joined["head"]
    assert torch.equal(joined["transposed"], weight.T)


def test_views_that_differ_in_anything_are_kept_apart():
    storage = torch.arange(4, dtype=torch.float32)
    views = [
        storage[:2],
        storage[2:],
        storage[:3],
        storage[::2],
        storage.view(torch.int32),
        storage.view(2, 2),
    ]
    assert len(split(views)[1]) == len(views)
    numbers = torch.tensor([1 + 2j])
    assert len(split([numbers, numbers.conj()])[1]) == 2
    assert len(split([torch.empty(0), torch.empty(0)])[1]) == 2


@pytest.mark.parametrize("value", [{1, 2}, b"bytes", object(), 1j, torch.float32])
def test_other_objects_are_refused_with_their_place(value):
    with pytest.raises(TypeError, match=rf"groups\.0\.thing holds a {type(value).__name__}"):
        split({"groups": [{"thing": value}]})


def test_keys_of_other_types_are_refused():
    with pytest.raises(TypeError, match="a key of groups holds a frozenset"):
        split({"groups": {frozenset(): 1}})


@pytest.mark.parametrize("skeleton", [{TAG: "tensor", "name": "gone"}, {TAG: "pickle"}, {TAG: "tuple"}])
def test_a_skeleton_that_does_not_fit_is_a_key_error(skeleton):
    with pytest.raises(KeyError):
        join(skeleton, {})
