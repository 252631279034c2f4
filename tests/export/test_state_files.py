"""Exports of the state dict: exact, loadable by torch and safetensors alone, and small."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rarefy
from rarefy.checkpoint.error import CheckpointError
from rarefy.export import SavedModel, export, load_csr
from rarefy.models import GPTConfig, GPTModel
from rarefy.yaml_files.yaml_file import load_file as load_yaml
from saved_models import GPT, checkpoint, tokens

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpt_stdlib_rigl.yaml"
LOADERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "dense": lambda path: torch.load(path, weights_only=True),
    "safetensors": load_file,
    "csr": load_csr,
}


def gpt() -> GPTModel:
    return GPTModel(GPTConfig(**{key: value for key, value in GPT.items() if key != "name"})).eval()


@pytest.mark.parametrize("to", LOADERS)
def test_the_exported_model_computes_the_same(tmp_path: Path, to: str) -> None:
    path, sparse = checkpoint(tmp_path, GPT)
    done = export(path, to, tmp_path / "exported")
    state = LOADERS[to](tmp_path / "exported")
    assert not any(name.endswith("_mask") for name in state)
    dense = gpt()
    dense.load_state_dict(state)
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(dense.model(ids), sparse.model(ids))
    for name, mask in sparse.named_buffers():
        assert not state[name.removesuffix("_mask")][~mask].any()
    assert done.exported_bytes == (tmp_path / "exported").stat().st_size


def test_the_report_counts_tied_weights_once(tmp_path: Path) -> None:
    path, sparse = checkpoint(tmp_path, GPT, 0.75)
    done = export(path, "dense", tmp_path / "exported")
    sizes = [parameter.numel() for parameter in sparse.parameters()]
    masks = [mask for name, mask in sparse.named_buffers()]
    assert (done.size, done.dense_bytes) == (sum(sizes), 4 * sum(sizes))
    assert (done.sparse_weights, done.sparsity) == (len(masks), 0.75)
    assert done.nonzeros == sum(int(parameter.count_nonzero()) for parameter in sparse.parameters())
    assert done.ratio == done.exported_bytes / done.dense_bytes


@pytest.mark.parametrize("to", ["dense", "csr"])
def test_tied_weights_are_stored_once(tmp_path: Path, to: str) -> None:
    path, _ = checkpoint(tmp_path, GPT)
    export(path, to, tmp_path / "exported")
    state = LOADERS[to](tmp_path / "exported")
    names = ("model.lm_head.weight", "model.embedding_layer.word_embeddings.weight")
    assert state[names[0]].data_ptr() == state[names[1]].data_ptr()


def test_csr_at_ninety_percent_takes_at_most_0_22_of_the_dense_model(tmp_path: Path) -> None:
    init = load_yaml(EXAMPLE)["trainer"]["init"]
    model = GPTModel(GPTConfig(**{key: value for key, value in init["model"].items() if key != "name"}))
    sparsity = rarefy.configure(init["sparsity"], num_steps=500, seed=1)
    sparsity.apply(model)
    assert rarefy.summary(sparsity).actual_sparsity == pytest.approx(0.9, abs=1e-4)
    saved = SavedModel(Path("run"), model.state_dict())
    dense = export(saved, "dense", tmp_path / "dense")
    csr = export(saved, "csr", tmp_path / "csr")
    assert csr.dense_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert csr.ratio <= 0.22
    assert csr.exported_bytes <= 0.22 * dense.exported_bytes


def test_csr_keeps_the_masks(tmp_path: Path) -> None:
    path, sparse = checkpoint(tmp_path, GPT)
    export(path, "csr", tmp_path / "exported")
    state = load_csr(tmp_path / "exported", masks=True)
    assert state.keys() == sparse.state_dict().keys()
    assert all(torch.equal(state[name], value) for name, value in sparse.state_dict().items())


def test_csr_of_a_model_that_has_zeros_but_no_masks(tmp_path: Path) -> None:
    path, sparse = checkpoint(tmp_path, GPT)
    export(path, "dense", tmp_path / "dense.pt")
    done = export(tmp_path / "dense.pt", "csr", tmp_path / "csr")
    assert done.sparse_weights == 0 and done.sparsity == 0.0
    assert set(load_csr(tmp_path / "csr", masks=True)) - set(load_csr(tmp_path / "csr")) == {
        name for name, _ in sparse.named_buffers()
    }


def test_csr_of_a_dense_model_is_refused(tmp_path: Path) -> None:
    saved = SavedModel(Path("run"), nn.Linear(8, 8).state_dict())
    with pytest.raises(CheckpointError, match="run: is dense: no weight has a mask or enough zeros; give a"):
        export(saved, "csr", tmp_path / "csr")
    export(saved, "safetensors", tmp_path / "safetensors")
    assert load_file(tmp_path / "safetensors").keys() == {"weight", "bias"}


@pytest.mark.parametrize("to", ["safetensors", "csr"])
def test_tensors_that_safetensors_cannot_hold(tmp_path: Path, to: str) -> None:
    state = {"w": torch.eye(9), "c": torch.ones(1, dtype=torch.complex128)}
    with pytest.raises(CheckpointError, match=r"run: cannot be exported: c is torch.complex128"):
        export(SavedModel(Path("run"), state), to, tmp_path / "exported")


@pytest.mark.parametrize("to", LOADERS)
def test_a_slice_is_stored_without_the_rest(tmp_path: Path, to: str) -> None:
    state = {"w": torch.zeros(1000, 1000)[:16, :16]}
    state["w"].fill_diagonal_(1)
    assert export(SavedModel(Path("run"), state), to, tmp_path / "exported").exported_bytes < 5000
    assert torch.equal(LOADERS[to](tmp_path / "exported")["w"], torch.eye(16))


@pytest.mark.parametrize("to", LOADERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes_stay(tmp_path: Path, to: str, dtype: torch.dtype) -> None:
    state = {"w": torch.eye(16).to(dtype), "w_mask": torch.eye(16).bool(), "n": torch.tensor(3)}
    export(SavedModel(Path("run"), state), to, tmp_path / "exported")
    loaded = LOADERS[to](tmp_path / "exported")
    assert loaded["w"].dtype == dtype and torch.equal(loaded["w"].float(), torch.eye(16))
    assert torch.equal(loaded["n"], state["n"])
