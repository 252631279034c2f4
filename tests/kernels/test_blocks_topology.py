"""The topology of blocks, and the border to the compiled block kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import BlockTopology, active_blocks, whole_blocks
from rarefy.kernels.instruction_sets import extension, instruction_set_index

compiled = pytest.mark.skipif(
    instruction_set_index() is None or not hasattr(extension(), "best_matrix_unit"),
    reason="no compiled kernels for blocks",
)
block_sizes = st.tuples(st.sampled_from([1, 2, 8]), st.sampled_from([1, 3, 16]))


def actives(seed: int, down: int, across: int) -> Tensor:
    return torch.rand(down, across, generator=torch.Generator().manual_seed(seed)) < 0.5


@given(st.integers(0, 99), st.integers(0, 5), st.integers(0, 5), block_sizes, st.booleans())
def test_blocks_with_some_and_with_all_connections(
    seed: int, down: int, across: int, block: tuple[int, int], turned: bool
) -> None:
    shape = (down, block[0], across, block[1])
    generator = torch.Generator().manual_seed(seed)
    tiles = torch.rand(shape, generator=generator) < actives(seed, down, across)[:, None, :, None] * 0.5
    mask = tiles.reshape(down * block[0], across * block[1])
    # As the weights of modules are that hold them transposed.
    mask = mask.t().contiguous().t() if turned else mask
    assert torch.equal(active_blocks(mask, block), tiles.any(3).any(1))
    whole = tiles.any(3).any(1)[:, None, :, None].expand(shape).reshape(mask.shape)
    assert (whole_blocks(mask, block) is None) != torch.equal(mask, whole)
    found = whole_blocks(whole, block)
    assert found is not None and torch.equal(found, tiles.any(3).any(1))


def test_active_blocks_refuse_blocks_that_do_not_divide_the_mask() -> None:
    with pytest.raises(RarefyError, match=r"block: \(2, 2\) is not allowed for shape \(4, 3\)"):
        active_blocks(torch.ones(4, 3, dtype=torch.bool), (2, 2))


def test_the_gradient_of_a_dense_matrix_is_that_of_its_blocks() -> None:
    topology = BlockTopology.from_blocks(torch.tensor([[True, False], [True, True]]), (8, 16))
    values, weights = torch.randn(topology.values_shape).requires_grad_(), torch.randn(16, 32)
    dense = topology.dense(values)
    assert torch.equal(dense, topology.dense(values.detach()))
    (gradient,) = torch.autograd.grad((dense * weights).sum(), values)
    assert torch.equal(gradient, topology.gather(weights))


@given(st.integers(0, 99), st.integers(0, 5), st.integers(0, 5), block_sizes)
def test_masks_and_matrices_come_back(seed: int, down: int, across: int, block: tuple[int, int]) -> None:
    active = actives(seed, down, across)
    topology = BlockTopology.from_blocks(active, block)
    assert torch.equal(topology.active(), active)
    mask = active.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
    assert torch.equal(topology.mask(), mask)
    assert topology.nonzeros == int(mask.sum())
    matrix = torch.randn(mask.shape)
    values = topology.gather(matrix)
    assert values.shape == topology.values_shape
    assert torch.equal(topology.dense(values), matrix * mask)
    assert torch.equal(values.reshape(-1), matrix.reshape(-1)[topology.positions().reshape(-1)])


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 5), block_sizes)
def test_a_mask_gives_the_same_topology_as_its_blocks(
    seed: int, down: int, across: int, block: tuple[int, int]
) -> None:
    topology = BlockTopology.from_blocks(actives(seed, down, across), block)
    again = BlockTopology.from_mask(topology.mask(), block)
    assert again.sizes == topology.sizes
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, topology.tensors, strict=True))


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_the_transpose_is_that_of_the_transposed_mask(seed: int, down: int, across: int) -> None:
    active = actives(seed, down, across)
    topology = BlockTopology.from_blocks(active, (8, 16))
    transposed = BlockTopology.from_blocks(active.t(), (16, 8))
    assert torch.equal(topology.transposed_starts, transposed.starts)
    assert torch.equal(topology.transposed_indices, transposed.indices)
    number = torch.arange(topology.blocks, dtype=torch.float32).view(-1, 1, 1).expand(topology.values_shape)
    of_transpose = transposed.gather(topology.dense(number).t().contiguous())
    assert torch.equal(of_transpose[:, 0, 0].to(torch.int32), topology.order)


@given(st.integers(0, 99), st.integers(1, 5), st.integers(1, 5))
def test_sources_lead_to_the_old_values(seed: int, down: int, across: int) -> None:
    old = BlockTopology.from_blocks(actives(seed, down, across), (2, 3))
    new = BlockTopology.from_blocks(actives(seed + 1, down, across), (2, 3))
    values = torch.randn(old.values_shape)
    sources = new.sources_in(old)
    wanted = new.gather(old.dense(values))
    assert torch.equal(sources < 0, ~new.gather(old.mask()).all(2).all(1))
    assert torch.equal(values[sources[sources >= 0]], wanted[sources >= 0])


def test_density_counts_connections() -> None:
    assert BlockTopology.from_blocks(torch.tensor([[True, False], [False, False]]), (8, 8)).density == 0.25
    assert BlockTopology.from_blocks(torch.zeros(0, 3, dtype=torch.bool), (8, 8)).density == 0.0


def test_other_masks_are_refused() -> None:
    with pytest.raises(
        RarefyError, match=r"mask: torch.float32 with shape \(2, 2\) is not allowed; give a bool"
    ):
        BlockTopology.from_mask(torch.ones(2, 2), (2, 2))
    with pytest.raises(RarefyError, match=r"blocks \(2, 2\) that are active in part are not allowed"):
        BlockTopology.from_mask(torch.eye(2, dtype=torch.bool), (2, 2))
    with pytest.raises(RarefyError, match=r"block: \(2, 3\) is not allowed for shape \(2, 2\)"):
        BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), (2, 3))


TOPOLOGY = BlockTopology.from_blocks(torch.tensor([[True, False], [True, True]]), (8, 16))


def shape(**changed: int) -> Any:
    module: Any = extension()
    return module.BlockShape(**({"rows": 16, "columns": 32, "height": 8, "width": 16} | changed))


def lines(**changed: int) -> Any:
    module: Any = extension()
    starts = TOPOLOGY.starts.data_ptr()
    indices = TOPOLOGY.indices.data_ptr()
    return module.BlockLines(**({"lines": 2, "starts": starts, "indices": indices, "blocks": 3} | changed))


@compiled
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"height": 4}, "multiples of 8"),
        ({"width": 0}, "multiples of 8"),
        ({"rows": 20}, "multiples of height and width"),
        ({"columns": -16}, "multiples of height and width"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shape(**changed)


@compiled
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"blocks": 4}, "do not belong to one matrix"),
        ({"lines": 1}, "do not belong to one matrix"),
        ({"lines": -1}, "lines: give a whole number"),
        ({"starts": 0}, "starts: a null address"),
        ({"indices": 0}, "indices: a null address"),
    ],
)
def test_lines_that_do_not_fit_are_refused(changed: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        lines(**changed)


@compiled
@pytest.mark.parametrize(("name", "of"), [("blocks_forward", "by_row"), ("blocks_backward", "by_column")])
def test_lines_of_another_matrix_are_refused(name: str, of: str) -> None:
    module: Any = extension()
    addresses = ["values", "x"] + (["bias", "y"] if of == "by_row" else ["order", "grad", "grad_x"])
    addresses += [] if of == "by_row" else ["grad_values", "grad_bias"]
    other = {
        "isa": 0,
        "unit": "",
        "tokens": 0,
        "element": 0,
        "threads": 1,
        of: lines(),
        "shape": shape(rows=48, columns=64),
    }
    with pytest.raises(ValueError, match=f"{of}: it has another number of lines than the matrix"):
        getattr(module, name)(**dict.fromkeys(addresses, 0), **other)


@compiled
def test_unknown_matrix_units_are_refused() -> None:
    addresses = dict.fromkeys(["values", "x", "bias", "y"], 0)
    numbers = {"isa": 0, "tokens": 0, "element": 1, "threads": 1}
    module: Any = extension()
    with pytest.raises(ValueError, match="no such matrix unit on this machine"):
        module.blocks_forward(unit="v9", by_row=lines(), shape=shape(), **addresses, **numbers)
