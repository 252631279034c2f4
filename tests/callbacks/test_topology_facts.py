"""How a topology looks and how it moved."""

import pytest
import torch

from rarefy.callbacks.log_sparsity import dead_shares, grown_share, hamming_distance
from rarefy.roles import Axes

MASK = torch.tensor([[True, False, False, True], [False, False, False, False]])


def test_shares_of_an_empty_mask():
    nothing = torch.zeros(0, 4, dtype=torch.bool)
    assert grown_share(nothing, nothing) == hamming_distance(nothing, nothing) == 0
    assert dead_shares(nothing) is None


def test_the_distance_counts_what_came_and_what_went():
    old = torch.tensor([True, True, True, False, False, False, False, False])
    new = torch.tensor([True, False, False, False, True, False, False, False])
    assert hamming_distance(old, new) == 3 / 8 and grown_share(old, new) == 1 / 2


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        (Axes(), (0.5, 0.5)),
        (Axes(transposed=True), (0.5, 0.5)),
        # Each of two groups of a convolution has inputs of its own: two of four, and four of four, are dead.
        (Axes(groups=2), (0.5, 0.75)),
        (Axes(transposed=True, groups=2), (0.75, 0.5)),
        (Axes(unknown="its module is an Experts"), None),
    ],
)
def test_outputs_and_inputs_are_those_of_the_module(axes, expected):
    assert dead_shares(MASK, axes) == expected


def test_a_kernel_is_dead_where_all_of_its_positions_are():
    mask = torch.zeros(2, 4, 3, dtype=torch.bool)
    mask[1, 2, 0] = True
    assert dead_shares(mask) == (0.5, 0.75)


def test_a_vector_has_no_rows():
    assert dead_shares(torch.tensor([True])) is None
