"""Blocks seen as connections: the same as panels of the same mask, in an order of their own."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.kernels import BlockIndex, BlockTopology, Panels, index_of, sources_between


def random_mask(down, across, block, density, seed):
    active = torch.rand(down, across, generator=torch.Generator().manual_seed(seed)) < density
    return active.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


@given(
    down=st.integers(0, 4),
    across=st.integers(0, 4),
    block=st.sampled_from([(8, 8), (8, 24), (16, 8)]),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 9),
)
def test_it_holds_what_panels_hold(down, across, block, density, seed):
    old, new = (random_mask(down, across, block, density, seed + more) for more in (0, 1))
    matrix = torch.randn(old.shape)
    mine, panels = index_of(old, block), Panels.from_mask(old)
    assert isinstance(mine, BlockIndex) and mine.nonzeros == panels.nonzeros == int(old.sum())
    assert torch.equal(mine.mask(), old)
    assert torch.equal(mine.dense(mine.gather(matrix)), matrix * old)
    assert torch.equal(mine.gather(matrix), matrix.reshape(-1)[mine.positions()])
    later = index_of(new, block)
    for previous in (mine, panels):
        values = torch.cat([torch.zeros(1), previous.gather(matrix)])
        moved = values[sources_between(later, previous) + 1]
        assert isinstance(later, BlockIndex)
        assert torch.equal(later.sources_in(previous), sources_between(later, previous))
        assert torch.equal(later.dense(moved), matrix * (old & new))
    back = torch.cat([torch.zeros(1), later.gather(matrix)])[sources_between(panels, later) + 1]
    assert torch.equal(panels.dense(back), matrix * (old & new))


@pytest.mark.parametrize(
    ("mask", "block"),
    [
        (torch.eye(16, dtype=torch.bool), (8, 8)),
        (torch.ones(16, 12, dtype=torch.bool), (8, 8)),
        (torch.ones(16, 16, dtype=torch.bool), (4, 8)),
        (torch.ones(16, 16, dtype=torch.bool), None),
    ],
)
def test_other_masks_are_indexed_by_connections(mask, block):
    assert isinstance(index_of(mask, block), Panels)


def test_blocks_of_another_size_move_by_connections():
    whole = torch.ones(2, 2, dtype=torch.bool)
    small, large = (BlockIndex(BlockTopology.from_blocks(whole, size)) for size in [(8, 8), (16, 16)])
    corner = torch.zeros(2, 2, dtype=torch.bool)
    corner[0, 0] = True
    part = BlockIndex(BlockTopology.from_blocks(corner, (8, 8)))
    assert int((small.sources_in(part) >= 0).sum()) == 64
    one = BlockIndex(BlockTopology.from_blocks(torch.ones(1, 1, dtype=torch.bool), (16, 16)))
    assert torch.equal(one.positions()[one.sources_in(one)], one.positions())
    assert torch.equal(small.positions()[one.sources_in(small)], one.positions())
    assert large.nonzeros == 1024


class Marked(torch.Tensor):
    """A subclass, whose operations may be watched."""


@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (70,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_by_the_shortest_way_have_the_bits_of_the_operation(isa, batch, dtype):
    index = index_of(random_mask(3, 5, (8, 16), 0.4, 0), (8, 16))
    assert isinstance(index, BlockIndex)
    # Not contiguous, where there is more than one token.
    grad, x = (torch.randn(size, *batch).to(dtype).movedim(0, -1) for size in (index.rows, index.columns))
    values = torch.randn(index.nonzeros)
    for needs in ([True, True, True], [True, False, False], [False, True, True]):
        found = index.infer_gradients(grad, x, values, needs)
        wanted = index.gradients(grad, x, values, needs)
        assert (found is None) == (isa == "reference")
        for one, other, needed in zip(found or wanted, wanted, needs, strict=True):
            assert not needed or (torch.equal(one, other) and one.shape == other.shape)


def test_gradients_that_are_left_to_the_operation():
    index = index_of(random_mask(2, 2, (8, 8), 1.0, 0), (8, 8))
    assert isinstance(index, BlockIndex)
    grad, x, values, needs = torch.ones(2, 16), torch.ones(2, 16), torch.ones(index.nonzeros), [True] * 3
    assert index.infer_gradients(grad, x, values.clone().requires_grad_(), needs) is None
    assert index.infer_gradients(grad.as_subclass(Marked), x, values, needs) is None
    assert index.infer_gradients(grad, x.bfloat16(), values, needs) is None
    for other in (torch.ones(1, 16), torch.ones(3, 16), torch.ones(2, 15), torch.ones(16)):
        assert index.infer_gradients(grad, other, values, needs) is None
    assert index.infer_gradients(grad.double(), x.double(), values, needs) is None
    assert index.infer_gradients(grad, x, values.double(), needs) is None
    assert index.infer_gradients(grad, x, values.repeat_interleave(2)[::2], needs) is None
