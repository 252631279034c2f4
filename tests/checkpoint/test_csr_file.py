"""Values and indices in a safetensors file: exact both ways, small, and every damage one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from rarefy.checkpoint.csr_file import Connections, encode_csr, load_csr
from rarefy.checkpoint.error import CheckpointError, NewerFormatError
from rarefy.checkpoint.tensor_file import read_metadata

MASK = torch.tensor([[False, True, False], [False, False, False], [True, False, True]])
WEIGHT = torch.tensor([[0.0, 5.0, 0.0], [0.0, 0.0, 0.0], [7.0, 0.0, 0.0]])


def write(path: Path, state: dict[str, Tensor], active: dict[str, Tensor], tied: dict[str, str]) -> Path:
    path.write_bytes(b"".join(encode_csr(state, active, tied)))
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    state = {"fc.weight": WEIGHT, "fc.bias": torch.ones(3), "head.weight": torch.ones(3)}
    return write(tmp_path / "model", state, {"fc.weight": MASK}, {"head.weight": "fc.bias"})


def test_the_file_is_what_its_description_says(file: Path) -> None:
    tensors = load_file(file)
    assert {name: (value.dtype, value.tolist()) for name, value in tensors.items()} == {
        "fc.weight/values": (torch.float32, [5.0, 7.0, 0.0]),
        "fc.weight/columns": (torch.uint16, [1, 0, 2]),
        "fc.weight/starts": (torch.uint16, [0, 1, 1, 3]),
        "fc.bias": (torch.float32, [1.0, 1.0, 1.0]),
    }
    metadata = read_metadata(file)
    assert json.loads(metadata.pop("layout")) == {
        "sparse": {"fc.weight": [3, 3]},
        "tied": {"head.weight": "fc.bias"},
    }
    assert metadata == {"format": "rarefy-csr", "version": "1"}


def test_loading_gives_weights_masks_and_tied_tensors_back(file: Path) -> None:
    state = load_csr(str(file), masks=True)
    assert sorted(state) == ["fc.bias", "fc.weight", "fc.weight_mask", "head.weight"]
    assert torch.equal(state["fc.weight"], WEIGHT)
    assert torch.equal(state["fc.weight_mask"], MASK)
    assert state["head.weight"] is state["fc.bias"]
    assert "fc.weight_mask" not in load_csr(file)


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=4),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(0, 100),
)
def test_any_shape_and_mask_come_back(shape: list[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < 0.3
    weight = torch.where(mask, torch.randn(shape, generator=generator), 0.0).to(dtype)
    found, found_mask = Connections.of(weight, mask).weight_and_mask(shape)
    assert torch.equal(found, weight) and found.dtype == dtype
    assert torch.equal(found_mask, mask)


@pytest.mark.parametrize(("columns", "dtype"), [(65536, torch.uint16), (65537, torch.int32)])
def test_column_indices_take_two_bytes_where_they_fit(columns: int, dtype: torch.dtype) -> None:
    mask = torch.zeros(2, columns, dtype=torch.bool)
    mask[1, -1] = True
    connections = Connections.of(mask.float(), mask)
    assert connections.columns.dtype == dtype
    assert torch.equal(connections.weight_and_mask(mask.shape)[1], mask)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("starts", [0, 1, 3]),
        ("starts", [0, 2, 1, 3]),
        ("starts", [0, 1, 1, 2]),
        ("columns", [1, 2, 2]),
        ("columns", [1, 0, 3]),
        ("columns", [1, 0, -1]),
        ("columns", [1, 0]),
        ("values", [1, 0]),
        ("values", None),
    ],
)
def test_indices_that_do_not_fit_are_damage(file: Path, part: str, value: list[int] | None) -> None:
    tensors, metadata = load_file(file), read_metadata(file)
    if value is None:
        del tensors[f"fc.weight/{part}"]
    else:
        tensors[f"fc.weight/{part}"] = torch.tensor(value)
    save_file(tensors, file, metadata)
    with pytest.raises(CheckpointError, match=r"model: is damaged \(.*; export it once more"):
        load_csr(file)


@pytest.mark.parametrize("layout", ["{", "{}", "[]", '{"sparse": {"fc.weight": 3}, "tied": {}}'])
def test_a_damaged_layout(file: Path, layout: str) -> None:
    save_file(load_file(file), file, read_metadata(file) | {"layout": layout})
    with pytest.raises(CheckpointError, match=r"model: is damaged"):
        load_csr(file)


def test_a_file_of_a_newer_rarefy(file: Path) -> None:
    save_file(load_file(file), file, read_metadata(file) | {"version": "2"})
    with pytest.raises(NewerFormatError, match="has layout 2; this rarefy reads layouts up to 1"):
        load_csr(file)


def test_other_files(tmp_path: Path) -> None:
    save_file({"w": torch.ones(1)}, tmp_path / "plain")
    with pytest.raises(CheckpointError, match="plain: holds no values and indices"):
        load_csr(tmp_path / "plain")
    (tmp_path / "text").write_text("not a file of tensors")
    with pytest.raises(CheckpointError, match="text: is no safetensors file"):
        load_csr(tmp_path / "text")
    with pytest.raises(FileNotFoundError):
        load_csr(tmp_path / "none")
