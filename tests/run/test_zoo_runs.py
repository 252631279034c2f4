"""Models of the family train with RigL through the command line and resume bit by bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from rarefy.cli.app import app

MODELS: dict[str, dict[str, Any]] = {
    "llama": {
        "name": "llama",
        "position_embedding_type": "rotary",
        "rotary_dim": 8,
        "rope_theta": 500000.0,
        "pos_scaling_type": "llama3",
        "pos_scaling_factor": 8.0,
        "attention_module": "multiquery_attention",
        "extra_attention_params": {"num_kv_groups": 2},
        "norm_type": "rmsnorm",
        "nonlinearity": "swiglu",
        "share_embedding_weights": False,
        "use_ffn_bias": False,
    },
    "btlm": {
        "name": "btlm",
        "position_embedding_type": "alibi",
        "nonlinearity": "swiglu",
        "mup_base_hidden_size": 16,
        "mup_base_filter_size": 24,
        "embeddings_scale": 14.6,
        "output_logits_alpha": 2.22,
        "loss_scaling": "batch_size",
        "loss_weight": 0.05,
    },
    "mixtral": {
        "name": "mixtral",
        "position_embedding_type": "rotary",
        "rotary_dim": 8,
        "nonlinearity": "swiglu",
        "moe": {
            "num_experts": 4,
            "top_k": 2,
            "load_balancing_loss_coef": 0.02,
            "moe_implementation": "optimized",
        },
    },
}
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "filter_size": 48,
    "max_position_embeddings": 16,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}


def written(folder: Path, model: dict[str, Any]) -> Path:
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 64, (40, 17), dtype=np.int32)
    rows = np.stack([tokens[:, :-1], np.ones((40, 16), np.int32), tokens[:, 1:]], axis=1)
    (folder / "data").mkdir()
    with h5py.File(folder / "data" / "a.h5", "w") as file:
        file["data"] = rows
    schedule = {"LinearLR": {"initial_learning_rate": 0.0, "end_learning_rate": 0.01, "total_iters": 20}}
    content = {
        "trainer": {
            "init": {
                "seed": 1,
                "device": "cpu",
                "model": {**model, **SIZES},
                "optimizer": {"AdamW": {"betas": [0.9, 0.95], "weight_decay": 0.1, "correct_bias": True}},
                "schedulers": [{"ScalePerParamLR": {"scheduler": schedule}}],
                "precision": {"enabled": False, "max_gradient_norm": 1.0},
                "sparsity": {
                    "algorithm": "rigl",
                    "sparsity": 0.9,
                    "update": {"freq": 4},
                    "param_filter": "*decoder*layer*weight*",
                },
                "loop": {"max_steps": 20},
                "checkpoint": {"steps": 10},
            },
            "fit": {
                "train_dataloader": {
                    "data_processor": "GptHDF5DataProcessor",
                    "data_dir": str(folder / "data"),
                    "batch_size": 4,
                    "shuffle": True,
                }
            },
        }
    }
    path = folder / "params.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def run(params: Path, out: Path, *flags: str) -> None:
    result = CliRunner().invoke(app, ["run", str(params), "-o", str(out), *flags])
    assert result.exit_code == 0, result.output


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_with_rigl_and_a_resume_in_between(tmp_path: Path, name: str) -> None:
    params = written(tmp_path, MODELS[name])
    run(params, tmp_path / "whole")
    run(params, tmp_path / "parts", "--max_steps", "10")
    run(params, tmp_path / "parts")
    whole = load_file(tmp_path / "whole" / "checkpoint_20" / "model.safetensors")
    parts = load_file(tmp_path / "parts" / "checkpoint_20" / "model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(whole[key].equal(parts[key]) for key in whole)
    first = load_file(tmp_path / "whole" / "checkpoint_10" / "model.safetensors")
    masks = [key for key in whole if key.endswith("_mask")]
    assert masks
    assert any(not first[key].equal(whole[key]) for key in masks)
    active = sum(int(whole[key].sum()) for key in masks) / sum(whole[key].numel() for key in masks)
    assert active == pytest.approx(0.1, abs=0.01)
