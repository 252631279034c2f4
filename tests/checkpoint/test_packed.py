"""What is mostly zeros takes little room in a file, and comes back bit for bit."""

from __future__ import annotations

import math
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rarefy
from rarefy.checkpoint import packed
from rarefy.checkpoint.directory import CheckpointParts, load, save
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.packed import pack, unpack
from rarefy.checkpoint.saved_model import open_saved
from rarefy.checkpoint.tensor_file import DTYPE_NAMES, encode_tensors

SHAPE = (256, 256)


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def sparse(dtype, shape, density, seed):
    generator = torch.Generator().manual_seed(seed)
    count = math.prod(shape)
    size = torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    whole = torch.randint(high, (count, size), dtype=torch.uint8, generator=generator)
    whole[torch.rand(count, generator=generator) >= density] = 0
    return whole.view(-1).view(dtype).reshape(shape)


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert torch.equal(bits(found[name]), bits(tensor))


def test_few_entries_take_no_room_at_the_places_of_many():
    many = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)) < 0.5
    few = torch.zeros(SHAPE)
    few[many] = (torch.arange(int(many.sum())) % 500 == 0).float()
    found, _ = pack({"few": few, "mask": many})
    assert found["few.values"].numel() == int(few.sum())


@settings(deadline=None, max_examples=100)
@given(
    st.dictionaries(
        st.sampled_from(["w", "w.values", "w.bits", "w_mask", "v.places", "v", ""]),
        st.tuples(
            st.sampled_from(sorted(DTYPE_NAMES, key=str)),
            st.lists(st.integers(0, 9), max_size=3),
            st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
            st.integers(0, 1),
        ),
    )
)
def test_every_dtype_shape_and_density_is_exact(kinds):
    tensors = {name: sparse(*kind) for name, kind in kinds.items()}
    with patch.object(packed, "SMALLEST", 1):
        assert_same(unpack(*pack(tensors)), tensors)


def test_negative_zeros_infinities_and_nan_are_kept():
    tensor = torch.zeros(SHAPE)
    tensor[0, :4] = torch.tensor([-0.0, float("inf"), float("nan"), 1e-45])
    tensors, metadata = pack({"w": tensor})
    assert tensors["w.values"].numel() == 4
    assert torch.equal(bits(unpack(tensors, metadata)["w"]), bits(tensor))


def test_a_weight_needs_no_bits_of_its_own_where_its_mask_has_them():
    mask = torch.rand(SHAPE) < 0.1
    weight = torch.where(mask, torch.randn(SHAPE), 0)
    weight[mask.nonzero()[0, 0], mask.nonzero()[0, 1]] = 0  # a connection that has just been grown
    tensors, metadata = pack({"w": weight, "w_mask": mask, "b": torch.zeros(4)})
    assert set(tensors) == {"w.values", "w_mask.bits", "b"}
    assert_same(unpack(tensors, metadata), {"w": weight, "w_mask": mask, "b": torch.zeros(4)})


def test_few_values_are_kept_with_their_places_and_dense_tensors_as_they_are():
    few = torch.zeros(SHAPE).index_put_((torch.arange(20), torch.arange(20)), torch.ones(20))
    tensors, _ = pack({"few": few, "dense": torch.ones(SHAPE)})
    assert set(tensors) == {"few.values", "few.places", "dense"}


def test_small_tensors_stay_readable_by_any_reader():
    tensors, metadata = pack({"w": torch.zeros(100, 100), "w_mask": torch.zeros(100, 100, dtype=torch.bool)})
    assert set(tensors) == {"w", "w_mask"} and not metadata


@pytest.mark.parametrize("part", ["w.values", "w.bits"])
def test_a_file_that_does_not_fit_its_header_is_refused(part, tmp_path):
    tensors, metadata = pack({"w": torch.rand(SHAPE) * (torch.rand(SHAPE) < 0.3)})
    tensors[part] = tensors[part][:-1].clone()
    with pytest.raises(ValueError, match=r"\d+ (values for|bytes of bits)"):
        unpack(tensors, metadata)
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"".join(encode_tensors(tensors, metadata)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_saved(file)


def test_an_unpacked_checkpoint_of_format_1_is_read(tmp_path):
    weight = torch.where(torch.rand(SHAPE) < 0.1, torch.randn(SHAPE), 0)
    with (
        patch.object(packed, "SMALLEST", 1 << 40),
        patch("rarefy.checkpoint.writing.frozen.version_of", lambda _: 1),
    ):
        path = save(tmp_path, 1, CheckpointParts(model={"w": weight}))
    assert torch.equal(load(path).model["w"], weight)


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_checkpoint_is_as_small_as_its_model(compute, tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(512, 512, bias=False) for _ in range(2)))
    sparsity = rarefy.RigL(0.9, update={"freq": 2}, compute=compute, seed=0)
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters())
    sparsity.apply(optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(8, 512)).square().mean().backward()
        optimizer.step()
    parts = CheckpointParts(model.state_dict(), optimizer.state_dict(), sparsity.state_dict())
    path = save(tmp_path, 3, parts)
    dense = 2 * 512 * 512 * 4
    weights = (path / "model.safetensors").stat().st_size
    states = (path / "optimizer.safetensors").stat().st_size
    assert weights <= 0.16 * dense
    assert weights + states + (path / "state.safetensors").stat().st_size <= 0.2 * 3 * dense
    assert_same(load(path).model, {name: tensor.detach() for name, tensor in model.state_dict().items()})
