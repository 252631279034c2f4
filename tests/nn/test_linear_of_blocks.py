"""A linear layer that is born with a weight of blocks."""

import pytest
import torch
from torch import nn

from rarefy.nn import SparseLinear


@pytest.mark.parametrize("size", [(8, 8), (16, 8), (3, 4)])
def test_a_layer_of_blocks_computes_what_its_mask_says(size):
    active = torch.rand(3, 4, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = active.repeat_interleave(size[0], 0).repeat_interleave(size[1], 1)
    linear, x = nn.Linear(mask.shape[1], mask.shape[0]), torch.randn(5, mask.shape[1])
    layer = SparseLinear.from_linear(linear, mask, block=size)
    assert layer.weight.topology.has_blocks == (size[0] % 8 == 0)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, linear.weight * mask, linear.bias))
    with torch.no_grad():
        torch.testing.assert_close(layer(x[0]), layer(x)[0])
    sources = layer.set_topology(~mask)
    assert layer.weight.topology.has_blocks == (size[0] % 8 == 0) and bool((sources < 0).all())
    assert SparseLinear(mask, block=size).weight.connections == int(mask.sum())
