"""Squares of what layers are given, against unfolding by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from rarefy.errors import RarefyError
from rarefy.roles import Place
from rarefy.saliency.inputs import SquareSums, check_watchable, input_squares, watched


@settings(max_examples=25, deadline=None)
@given(
    groups=st.sampled_from([1, 2]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 2),
    padding=st.one_of(st.integers(0, 2), st.just("valid")),
    dilation=st.integers(1, 2),
)
def test_convolutions_by_unfolding(groups, kernel, stride, padding, dilation):
    layer = nn.Conv2d(4, 6, kernel, stride, padding, dilation, groups)
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    pads = 0 if padding == "valid" else padding
    columns = functional.unfold(x, kernel, dilation, pads, stride)
    by_channel = columns.square().sum((0, 2)).view(4, *kernel)
    found = input_squares(layer, x)
    for output in range(6):
        first = (output // (6 // groups)) * (4 // groups)
        torch.testing.assert_close(found[output], by_channel[first : first + 4 // groups])


def test_padding_that_keeps_the_size():
    layer = nn.Conv1d(1, 2, 3, padding="same")
    assert input_squares(layer, torch.tensor([[1.0, 2.0, 3.0]]))[0].tolist() == [[5.0, 14.0, 13.0]]


def test_linear_layers():
    x = torch.randn(2, 5, 3)
    assert torch.allclose(input_squares(nn.Linear(3, 4), x), x.square().sum((0, 1))[None])
    assert input_squares(nn.Linear(3, 4), x[0, 0]).shape == (1, 3)
    half = torch.full((1, 2), 300.0, dtype=torch.float16)
    assert input_squares(nn.Linear(2, 1).half(), half).tolist() == [[90000.0, 90000.0]]


def test_keyword_inputs_are_seen():
    layer = nn.Linear(2, 1)
    sums = SquareSums("wanda")
    with watched([("w", layer)], sums.see):
        layer(input=torch.tensor([[1.0, 2.0]]))
        layer(torch.tensor([[1.0, 0.0]]))
    layer(torch.ones(1, 2))
    assert sums.of("w").tolist() == [[2.0, 4.0]]


def test_what_cannot_be_watched():
    attention = nn.MultiheadAttention(4, 2)
    with pytest.raises(
        RarefyError, match="wanda needs the inputs of a, which a MultiheadAttention does not show; leave"
    ):
        check_watchable("a", Place(attention, "in_proj_weight"), "wanda")
    with pytest.raises(RarefyError, match="wanda cannot tell the padded inputs of c"):
        check_watchable("c", Place(nn.Conv1d(2, 2, 3, padding=1, padding_mode="circular"), "weight"), "wanda")
    sums = SquareSums("wanda")
    with pytest.raises(RarefyError, match="wanda saw no input of w; leave it out"):
        sums.of("w")
    sums.see("w", nn.Linear(1, 1), torch.tensor([[float("inf")]]))
    with pytest.raises(RarefyError, match="wanda saw an input of w that is not finite"):
        sums.of("w")
