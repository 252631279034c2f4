"""The example of each adapter runs, and what it leaves behind is what it promises."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[2] / "examples"


def main_of(name, *packages):
    for package in packages:
        pytest.importorskip(package)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_transformers_trainer(tmp_path, capsys):
    main = main_of("transformers_trainer", "transformers", "accelerate")
    assert main(str(tmp_path), steps=30) < 1.5
    assert "rigl" in capsys.readouterr().out
    from transformers import GPT2LMHeadModel

    model, info = GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["unexpected_keys"] and not info["missing_keys"]
    weight = model.transformer.h[0].mlp.c_fc.weight
    assert float((weight == 0).float().mean()) == pytest.approx(0.9, abs=0.02)


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")
def test_lightning_trainer(tmp_path, capsys):
    main = main_of("lightning_trainer", "pytorch_lightning")
    assert main(str(tmp_path), steps=20) == pytest.approx(0.8, abs=0.001)
    assert "rigl" in capsys.readouterr().out
    (saved,) = tmp_path.rglob("*.ckpt")
    assert torch.load(saved, weights_only=True)["callbacks"]["SparsityCallback"]["sparsity"]["step"] == 20


def test_accelerate_loop(tmp_path, capsys):
    main = main_of("accelerate_loop", "accelerate")
    assert main(str(tmp_path), steps=30) == pytest.approx(0.8, abs=0.001)
    assert "rigl" in capsys.readouterr().out
    assert torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)["step"] == 30
