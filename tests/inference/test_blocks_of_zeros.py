"""Which blocks a mask consists of."""

from __future__ import annotations

import pytest
import torch

from rarefy.inference.blocks_of_zeros import block_of


@pytest.mark.parametrize("block", [(8, 8), (32, 16), (64, 64), (8, 64)])
def test_the_largest_blocks_are_found(block: tuple[int, int]) -> None:
    units = torch.tensor([[True, False, True], [False, True, False], [False, False, True]])
    mask = units.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert block_of(mask) == block
    mask[0, 0] = False
    assert block_of(mask) is None


def test_a_shape_that_no_block_divides_has_none() -> None:
    assert block_of(torch.ones(12, 16, dtype=torch.bool)) is None


def test_a_transposed_mask() -> None:
    mask = torch.eye(2, dtype=torch.bool).repeat_interleave(8, 0).repeat_interleave(32, 1)
    assert block_of(mask) == (8, 32) and block_of(mask.t()) == (32, 8)
