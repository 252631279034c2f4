"""A model in memory as ONNX, in every storage."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import RarefyError
from rarefy.export import onnx_file, to_onnx
from rarefy.tensors import SparseWeight


def net(compute: str) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    rarefy.Static(0.5, compute=compute).apply(model)
    return model


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_sparse_model_computes_the_same(compute: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx: Any = pytest.importorskip("onnx")
    model, path, x = net(compute), tmp_path / "model.onnx", torch.randn(3, 8)
    to_onnx(model, {"x": torch.randn(2, 8)}, path, outputs=["y"])
    if importlib.util.find_spec("onnxruntime"):
        session: Any = importlib.import_module("onnxruntime").InferenceSession(str(path))
    else:
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    [y] = session.run(["y"], {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(y.copy()), model(x).detach(), atol=1e-6, rtol=1e-5)
    names = {tensor.name for tensor in onnx.load(path).graph.initializer}
    assert not [name for name in names if "mask" in name]
    assert isinstance(model[0].weight, SparseWeight) == (compute == "compact")
    assert model.training and "0.weight_mask" in model.state_dict()


def test_without_the_exporter_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(RarefyError, match=r"pip install 'rarefy\[onnx\]'"):
        to_onnx(net("masked"), {"x": torch.randn(2, 8)}, tmp_path / "model.onnx")


def test_a_file_that_cannot_be_written_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_file, "_require_exporter", lambda: None)
    monkeypatch.setattr(onnx_file, "_to_onnx", lambda interface: b"a model")
    path, inputs = tmp_path / "model.onnx", {"x": torch.randn(2, 8)}
    to_onnx(net("masked"), inputs, path)
    assert path.read_bytes() == b"a model"

    def fail(path: Path, parts: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(onnx_file, "write_file", fail)
    with pytest.raises(
        RarefyError, match=r"model\.onnx: cannot be written: No space left on device; free space"
    ):
        to_onnx(net("masked"), inputs, path)
    assert path.read_bytes() == b"a model" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RarefyError, match="a file is to be written, but this is a folder; give another path"):
        to_onnx(net("masked"), inputs, tmp_path)
    assert list(tmp_path.iterdir()) == [path]
