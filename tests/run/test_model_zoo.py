"""What Model Zoo files hold beyond rarefy's own keys, and the older form of file."""

from __future__ import annotations

from typing import Any

import yaml

from rarefy.run.model_zoo import drop_ignored, is_legacy, new_form

LEGACY: dict[str, Any] = {
    "model": {"name": "gpt3"},
    "sparsity": 0.3,
    "optimizer": {
        "optimizer_type": "AdamW",
        "learning_rate": [
            {"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 1.0, "steps": 10},
            {"scheduler": "CosineDecayLR", "total_iters": 20},
        ],
        "betas": [0.9, 0.95],
        "max_gradient_norm": 1.0,
    },
    "train_input": {"data_processor": "A"},
    "eval_input": {"data_processor": "B"},
    "runconfig": {"num_steps": 30, "checkpoint_steps": 10, "log_steps": 5, "seed": 2, "unknown": 1},
}


def test_new_form_of_a_whole_file() -> None:
    trainer = yaml.safe_load(new_form(LEGACY))["trainer"]
    assert trainer["init"] == {
        "model": {"name": "gpt3"},
        "sparsity": 0.3,
        "optimizer": {"AdamW": {"betas": [0.9, 0.95]}},
        "schedulers": [
            {"LinearLR": {"initial_learning_rate": 0.0, "end_learning_rate": 1.0, "total_iters": 10}},
            {"CosineDecayLR": {"total_iters": 20}},
        ],
        "precision": {"max_gradient_norm": 1.0},
        "loop": {"num_steps": 30},
        "checkpoint": {"steps": 10},
        "logging": {"log_steps": 5},
        "seed": 2,
    }
    assert trainer["fit"] == {
        "train_dataloader": {"data_processor": "A"},
        "val_dataloader": {"data_processor": "B"},
    }


def test_new_form_of_malformed_blocks() -> None:
    trainer = yaml.safe_load(new_form({"optimizer": 3, "runconfig": [1]}))["trainer"]
    assert trainer == {"init": {"model": {"name": "gpt2"}}, "fit": {}}


def test_is_legacy() -> None:
    assert is_legacy(LEGACY)
    assert not is_legacy({"trainr": {}})


def test_drop_ignored_leaves_malformed_blocks_and_the_given_mapping() -> None:
    given = {"backend": 3, "precision": {"precision_opt_level": 1}}
    rest, dropped = drop_ignored(given, "trainer.init")
    assert rest == {"backend": 3, "precision": {}}
    assert dropped == ["trainer.init.precision.precision_opt_level"]
    assert given["precision"] == {"precision_opt_level": 1}
