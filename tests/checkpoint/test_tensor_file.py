"""Tensors reach the file and come back bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load

from rarefy.checkpoint.tensor_file import CHUNK_BYTES, DTYPE_NAMES, encode_tensors, read_tensors, snapshot


def bits(tensor):
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def random_bits(dtype, shape):
    count = torch.empty(shape, dtype=dtype).numel() * torch.empty((), dtype=dtype).element_size()
    high = 2 if dtype == torch.bool else 256
    return torch.randint(high, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@settings(deadline=None, max_examples=60)
@given(
    st.dictionaries(
        st.text(min_size=1).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(sorted(DTYPE_NAMES, key=str)), st.lists(st.integers(0, 5), max_size=3)),
        max_size=6,
    )
)
def test_every_dtype_and_shape_is_exact(kinds):
    tensors = {name: random_bits(dtype, shape) for name, (dtype, shape) in kinds.items()}
    loaded = load(b"".join(encode_tensors(snapshot(tensors))))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape
        assert torch.equal(bits(loaded[name]), bits(tensor))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[::3],
        torch.ones(1).expand(5),
        torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.nn.Parameter(torch.ones(2)),
        torch.tensor([1 + 2j]).conj(),
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "parameter", "conjugate"],
)
def test_any_layout_keeps_its_values(tensor, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"".join(encode_tensors(snapshot({"t": tensor}))))
    assert torch.equal(read_tensors(path)["t"], tensor.detach())


def test_chunks_stay_small_and_complete():
    tensor = torch.randint(256, (2 * CHUNK_BYTES + 17,), dtype=torch.uint8)
    chunks = list(encode_tensors({"t": tensor}))
    assert max(map(len, chunks)) == CHUNK_BYTES
    assert torch.equal(load(b"".join(chunks))["t"], tensor)


def test_other_readers_see_the_names_without_loading(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        b"".join(encode_tensors({"b.weight": torch.ones(2), "a": torch.ones(1, dtype=torch.bool)}))
    )
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == {"a", "b.weight"}


def test_a_snapshot_does_not_follow_the_original():
    weight = torch.zeros(3)
    copy = snapshot({"w": weight})
    weight.add_(1)
    assert copy["w"].tolist() == [0, 0, 0]


@pytest.mark.parametrize("tensor", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")])
def test_tensors_that_are_not_dense_are_refused(tensor):
    with pytest.raises(TypeError, match="layer is not an ordinary dense tensor"):
        snapshot({"layer": tensor})


def test_dtypes_that_the_format_lacks_are_refused():
    with pytest.raises(TypeError, match=r"layer is torch\.complex128"):
        snapshot({"layer": torch.ones(1, dtype=torch.complex128)})
