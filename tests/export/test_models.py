"""Exports that build the model again: ONNX and Hugging Face folders, and every way in which that fails."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tiny_run
from helpers import needs_torch
from rarefy.checkpoint.error import CheckpointError
from rarefy.errors import RarefyError
from rarefy.export import SavedModel, export
from rarefy.export.hugging_face import architecture_of
from rarefy.export.job import Job
from rarefy.models import GPTModel, build_model
from saved_models import BERT, GPT, GPT2, TINY, checkpoint, tokens

CODE = """
import torch


class Pair(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, batch):
        return super().forward(batch[0]) + batch[1]


class Branches(torch.nn.Linear):
    def __init__(self):
        super().__init__(8, 8)

    def forward(self, x):
        return super().forward(x) if bool(x.sum() > 0) else x


def pairs():
    yield torch.ones(3, 8), torch.ones(3, 1)


def tensors():
    yield torch.ones(3, 8)


def words():
    yield {"x": "text"}


def nothing():
    return []
"""


def run_onnx(path: Path, **inputs: Tensor) -> dict[str, np.ndarray]:
    """What an ONNX file computes, by names of its outputs."""
    onnx = pytest.importorskip("onnx")
    arrays = {name: value.numpy() for name, value in inputs.items()}
    names = [one.name for one in onnx.load(path).graph.output]
    if importlib.util.find_spec("onnxruntime"):
        session = importlib.import_module("onnxruntime").InferenceSession(str(path))
    else:
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    return dict(zip(names, session.run(None, arrays), strict=True))


def close(found: Any, expected: Tensor) -> bool:
    return torch.allclose(torch.as_tensor(np.asarray(found)), expected, atol=1e-5)


def with_data(root: Path, model: dict[str, Any], processor: str) -> tuple[Path, nn.Module]:
    """A checkpoint whose run has a model and data from `more.py`."""
    (root / "more.py").write_text(CODE)
    path, made = checkpoint(root, model)
    params = tiny_run.configuration(root)
    params["trainer"]["init"]["model"] = model
    params["trainer"]["fit"]["train_dataloader"] = {"data_processor": processor}
    tiny_run.write(root, params)
    return path, made


# ---- ONNX ----


@needs_torch("2.10", "it exports to ONNX with the sizes of the example")
@pytest.mark.parametrize("model", [GPT | {"num_hidden_layers": 1}, GPT2], ids=["gpt2", "transformers"])
def test_a_language_model_as_onnx(tmp_path: Path, model: dict[str, Any]) -> None:
    pytest.importorskip("onnxscript")
    if model is GPT2:
        pytest.importorskip("transformers")
    path, sparse = checkpoint(tmp_path, model)
    export(path, "onnx", tmp_path / "model.onnx")
    for shape in ((1, 1), (2, 9), (4, 16)):
        ids = tokens(*shape)
        with torch.no_grad():
            outputs = sparse.model(ids)
        found = run_onnx(tmp_path / "model.onnx", input_ids=ids)
        assert list(found) == ["logits"]
        assert close(found["logits"], outputs if isinstance(outputs, Tensor) else outputs.logits)


def test_any_model_as_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path, sparse = checkpoint(tmp_path, TINY)
    export(path, "onnx", tmp_path / "model.onnx", params=tmp_path / "params.yaml")
    for rows in (1, 5):
        batch = {"x": torch.randn(rows, 8), "y": torch.randn(rows, 1)}
        found = run_onnx(tmp_path / "model.onnx", **batch)
        assert close(found["output"], sparse(batch).detach())


def test_batches_that_are_tuples(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path, sparse = with_data(tmp_path, {"name": "./more.py:Pair"}, "./more.py:pairs")
    export(path, "onnx", tmp_path / "model.onnx", params=tmp_path / "params.yaml")
    x, y = torch.randn(5, 8), torch.randn(5, 1)
    found = run_onnx(tmp_path / "model.onnx", input_0=x, input_1=y)
    assert close(found["output"], sparse((x, y)).detach())


@needs_torch("2.10", "it exports to ONNX with the sizes of the example")
def test_a_model_that_torch_cannot_export(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    path, _ = with_data(tmp_path, {"name": "./more.py:Branches"}, "./more.py:tensors")
    with pytest.raises(RarefyError, match="torch cannot export this model to ONNX") as caught:
        export(path, "onnx", tmp_path / "model.onnx", params=tmp_path / "params.yaml")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("processor", "problem"),
    [
        ("./more.py:words", "the model's batches are of another form than ONNX takes"),
        ("./more.py:nothing", "has no batch that could show what the model takes"),
    ],
)
def test_data_that_shows_no_input(tmp_path: Path, processor: str, problem: str) -> None:
    pytest.importorskip("onnxscript")
    path, _ = with_data(tmp_path, {"name": "./more.py:Pair"}, processor)
    with pytest.raises(RarefyError, match=problem):
        export(path, "onnx", tmp_path / "model.onnx", params=tmp_path / "params.yaml")


def test_a_run_without_data(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, GPT)
    content = tiny_run.configuration(tmp_path)
    del content["trainer"]["fit"]
    job = Job(SavedModel(path, {}, content))
    with pytest.raises(RarefyError, match=r"trainer.fit.train_dataloader: a missing value is not allowed"):
        job.batch()


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_onnx_without_its_extra(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(RarefyError, match=r"--to onnx needs onnx.*: pip install 'rarefy\[onnx\]'"):
        export(SavedModel(Path("run"), {}), "onnx", tmp_path / "model.onnx")


# ---- Hugging Face ----


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_ffn_bias": False, "use_projection_bias_in_attention": False, "share_embedding_weights": False},
        {"use_ffn_bias_in_attention": False, "layer_norm_epsilon": 0.1, "embedding_dropout_rate": 0.3},
    ],
)
def test_the_decoder_as_gpt2(tmp_path: Path, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    path, sparse = checkpoint(tmp_path, GPT | options)
    export(path, "hf", tmp_path / "folder")
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folder").eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, sparse.model(ids), atol=1e-5)
    found = loaded.transformer.h[1].mlp.c_fc.weight
    expected = sparse.model.transformer_decoder.layers[1].ffn.ffn[0].linear_layer.weight
    assert torch.equal(found, expected.t()) and (found == 0).float().mean() > 0.7
    rates = (loaded.config.resid_pdrop, loaded.config.embd_pdrop, loaded.config.attn_pdrop)
    assert rates == (0.1, options.get("embedding_dropout_rate", 0.1), 0.1)
    assert loaded.config.eos_token_id is None


def test_gpt2_has_gpt2s_last_token() -> None:
    sizes = {"hidden_size": 4, "num_heads": 1, "filter_size": 4, "num_hidden_layers": 1}
    model = build_model({"name": "gpt2", **sizes})
    assert isinstance(model, GPTModel)
    options = architecture_of(model).as_options(model.config)
    found = (options["vocab_size"], options["bos_token_id"], options["eos_token_id"])
    assert found == (50257, 50256, 50256)


def test_models_of_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    path, sparse = checkpoint(tmp_path / "gpt2", GPT2)
    export(path, "hf", tmp_path / "gpt2_folder")
    export(path, "hf", tmp_path / "gpt2_folder", force=True)
    causal = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt2_folder").eval()
    ids = tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(causal(ids).logits, sparse.model(ids).logits)
    assert causal.config.use_cache
    path, sparse = checkpoint(tmp_path / "bert", BERT)
    export(path, "hf", tmp_path / "bert_folder")
    bert = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert_folder").eval()
    with torch.no_grad():
        assert torch.equal(bert(ids).logits, sparse.model(ids).logits)


def test_other_models_have_no_folder(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, TINY)
    with pytest.raises(RarefyError, match="--to hf: Tiny is not allowed; give a model of Transformers, or"):
        export(path, "hf", tmp_path / "folder", params=tmp_path / "params.yaml")


def test_the_decoder_needs_nothing_of_transformers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path, GPT)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert export(path, "hf", tmp_path / "folder").sparsity > 0.7
    assert sorted(one.name for one in (tmp_path / "folder").iterdir()) == ["config.json", "model.safetensors"]


# ---- models that cannot be built ----


def test_a_foreign_file_needs_the_file_of_its_run(tmp_path: Path) -> None:
    _, sparse = checkpoint(tmp_path, TINY)
    torch.save(sparse.state_dict(), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model.pt: does not say how its model is built; .* --params"):
        export(tmp_path / "model.pt", "hf", tmp_path / "folder")


def test_imports_that_are_off(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path, TINY)
    with pytest.raises(RarefyError, match="imports are off"):
        export(path, "hf", tmp_path / "folder", allow_imports=False)
    with pytest.raises(RarefyError, match="imports are off"):
        export(path, "hf", tmp_path / "folder", params=tmp_path / "params.yaml", allow_imports=False)


def test_a_model_file_that_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = checkpoint(tmp_path, TINY)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    problem = r"its model cannot be built \(.*there is no such file.*\); or give --params"
    with pytest.raises(CheckpointError, match=problem):
        export(path, "hf", tmp_path / "folder")


def test_the_file_of_another_run(tmp_path: Path) -> None:
    path, _ = checkpoint(tmp_path / "one", GPT)
    checkpoint(tmp_path / "other", GPT | {"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"is of another model: it has unknown .*--params PARAMS.yaml"):
        export(path, "hf", tmp_path / "folder", params=tmp_path / "other" / "params.yaml")
