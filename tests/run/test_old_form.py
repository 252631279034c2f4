"""The older form of file, converted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rarefy.cli.app import app
from rarefy.errors import ConfigError
from rarefy.run.old_form import convert_file, in_new_form, is_old, new_form
from rarefy.run.schema import parse, read_file

OLD: dict[str, Any] = {
    "train_input": {
        "data_processor": "GptHDF5MapDataProcessor",
        "data_dir": "data/train",
        "batch_size": 2,
        "micro_batch_size": None,
    },
    "eval_input": {
        "data_processor": "GptHDF5DataProcessor",
        "data_dir": "data/val",
        "batch_size": 2,
        "num_examples": 3,
        "micro_batch_size": 7,
    },
    "model": {
        "hidden_size": 48,
        "mixed_precision": True,
        "fp16_type": "cbfloat16",
        "scale_by_layer_index": False,
    },
    "optimizer": {
        "optimizer_type": "AdamW",
        "log_summaries": True,
        "learning_rate": [
            {"scheduler": "Linear", "initial_learning_rate": 0.0, "end_learning_rate": 1.0, "steps": 10},
            {"scheduler": "CosineDecayLR", "initial_learning_rate": 1.0, "total_iters": 20},
        ],
        "betas": [0.9, 0.95],
        "max_gradient_norm": 1.0,
        "loss_scaling_factor": "dynamic",
        "adjust_learning_rate": {"decoder_kernel": 0.5},
    },
    "sparsity": {
        "type": "rigl",
        "sparsity": 0.75,
        "schedule": {"freq": 2},
        "param_name_patterns": [".*proj_[qkv]_dense_layer.weight", ".*linear_layer.weight"],
        "add_summaries": True,
    },
    "runconfig": {
        "max_steps": 30,
        "checkpoint_steps": 10,
        "log_steps": 5,
        "seed": 2,
        "eval_frequency": 5,
        "disable_strict_checkpoint_loading": True,
        "load_checkpoint_states": "model",
        "checkpoint_path": "a.mdl",
        "target_device": "CPU",
        "mode": "train",
        "num_csx": 1,
    },
}


def test_a_whole_file() -> None:
    converted, dropped = new_form(OLD)
    assert converted["trainer"]["init"] == {
        "model": {"name": "gpt2", "hidden_size": 48, "scale_qk_dot_by_layer_idx": False},
        "precision": {
            "enabled": True,
            "fp16_type": "cbfloat16",
            "max_gradient_norm": 1.0,
            "loss_scaling_factor": "dynamic",
        },
        "optimizer": {"AdamW": {"betas": [0.9, 0.95], "adjust_learning_rate": {"decoder_kernel": 0.5}}},
        "schedulers": [
            {
                "SequentialLR": {
                    "schedulers": [
                        {
                            "LinearLR": {
                                "initial_learning_rate": 0.0,
                                "end_learning_rate": 1.0,
                                "total_iters": 10,
                            }
                        },
                        {"CosineDecayLR": {"initial_learning_rate": 1.0, "total_iters": 20}},
                    ]
                }
            }
        ],
        "sparsity": {
            "algorithm": "rigl",
            "sparsity": 0.75,
            "update": {"freq": 2},
            "param_filter": ["*proj_[qkv]_dense_layer.weight", "*linear_layer.weight"],
        },
        "callbacks": [{"LogSparsity": {}}, {"LoadCheckpointStates": {"load_checkpoint_states": "model"}}],
        "loop": {"max_steps": 30, "eval_frequency": 5},
        "checkpoint": {"steps": 10, "disable_strict_checkpoint_loading": True},
        "logging": {"log_steps": 5},
        "seed": 2,
        "device": "CPU",
    }
    assert converted["trainer"]["fit"] == {
        "train_dataloader": {
            "data_processor": "GptHDF5MapDataProcessor",
            "data_dir": "data/train",
            "batch_size": 2,
        },
        "val_dataloader": {"data_processor": "GptHDF5DataProcessor", "data_dir": "data/val", "batch_size": 2},
        "ckpt_path": "a.mdl",
    }
    assert dropped == [
        "optimizer.log_summaries",
        "eval_input.num_examples",
        "eval_input.micro_batch_size",
        "runconfig.num_csx",
    ]
    parse(converted)


@pytest.mark.parametrize(
    ("rate", "schedulers", "options"),
    [
        (0.1, None, {"learning_rate": 0.1}),
        ({"scheduler": "Constant", "val": 0.1}, [{"ConstantLR": {"learning_rate": 0.1}}], {}),
        ([{"scheduler": "Constant", "learning_rate": 0.1}], [{"ConstantLR": {"learning_rate": 0.1}}], {}),
    ],
)
def test_forms_of_the_learning_rate(rate: Any, schedulers: Any, options: dict[str, Any]) -> None:
    init = new_form({"optimizer": {"learning_rate": rate}})[0]["trainer"]["init"]
    assert init.get("schedulers") == schedulers
    assert init["optimizer"] == {"AdamW": options}


@pytest.mark.parametrize("key", ["residual_dropout_rate", "use_untied_layer_norm"])
def test_keys_of_gptj_tell_its_name(key: str) -> None:
    assert new_form({"model": {key: 0}})[0]["trainer"]["init"]["model"]["name"] == "gptj"


@pytest.mark.parametrize(
    ("pattern", "glob"),
    [
        (".*linear_layer.weight", "*linear_layer.weight"),
        (r".*ffn\.ffn\..*weight$", "*ffn.ffn.*weight"),
        ("proj_[qkv]_dense_layer.weight", "*proj_[qkv]_dense_layer.weight"),
    ],
)
def test_patterns_of_names(pattern: str, glob: str) -> None:
    init = new_form({"sparsity": {"param_name_patterns": pattern}, "model": {}})[0]["trainer"]["init"]
    assert init["sparsity"]["param_filter"] == [glob]


def test_numbers_and_lists_of_sparsity_stay() -> None:
    assert new_form({"sparsity": 0.3, "model": {}})[0]["trainer"]["init"]["sparsity"] == 0.3
    several = new_form({"sparsity": [{"type": "static", "sparsity": 0.3}], "model": {}})[0]
    assert several["trainer"]["init"]["sparsity"] == [{"algorithm": "static", "sparsity": 0.3}]


def test_is_old() -> None:
    assert is_old(OLD)
    assert not is_old({"trainr": {}})
    assert not is_old({"trainer": {}, "model": {}})


def test_the_new_form_stays() -> None:
    new = {"trainer": {"init": {}}}
    assert in_new_form(new) is new


def test_the_given_mapping_stays_as_it_is() -> None:
    before = yaml.safe_dump(OLD)
    new_form(OLD)
    assert yaml.safe_dump(OLD) == before


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"optimizer": True, "model": {}}, "optimizer: true is not allowed; give a mapping"),
        ({"optimizer": 3, "model": {}}, "optimizer: 3 is not allowed; give a mapping"),
        (
            {"model": {}, "csx": {}},
            "the key 'csx' in the older form of file is not allowed; give model, optimizer",
        ),
        (
            {"optimizer": {"learning_rate": [3]}},
            "optimizer.learning_rate[0]: 3 is not allowed; give a mapping with scheduler",
        ),
        (
            {"model": {}, "sparsity": {"param_name_patterns": "(a|b)"}},
            "sparsity.param_name_patterns: '(a|b)' is not allowed; give a glob as sparsity.param_filter",
        ),
        (
            {"model": {}, "train_input": {"data_processor": "BertCSVDynamicMaskDataProcessor"}},
            "train_input.data_processor: BertCSVDynamicMaskDataProcessor, data of another kind of model, is not",
        ),
    ],
)
def test_what_cannot_be_converted(content: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        new_form(content)
    assert expected in str(error.value)


def written(folder: Path) -> Path:
    path = folder / "old.yaml"
    path.write_text(yaml.safe_dump(OLD))
    return path


def test_convert_prints_and_writes_the_new_form(tmp_path: Path) -> None:
    path = written(tmp_path)
    result = CliRunner().invoke(app, ["convert", str(path)])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.stdout) == new_form(OLD)[0]
    assert result.stdout.startswith("# left out, no use for optimizer.log_summaries, ")
    new = tmp_path / "new.yaml"
    assert CliRunner().invoke(app, ["convert", str(path), "-o", str(new)]).exit_code == 0
    assert read_file(new) == read_file(path) == new_form(OLD)[0]
    again = CliRunner().invoke(app, ["convert", str(path), "-o", str(new)])
    assert again.exit_code == 2 and "which exists" in again.output
    assert CliRunner().invoke(app, ["convert", str(path), "-o", str(new), "--force"]).exit_code == 0


def test_convert_of_the_new_form(tmp_path: Path) -> None:
    path = tmp_path / "new.yaml"
    path.write_text("trainer: {init: {}}")
    with pytest.raises(ConfigError, match="does not have the older form"):
        convert_file(path)


@pytest.mark.parametrize(("size", "expected"), [(8, 8), ("auto", "auto"), (None, None)])
def test_the_part_of_a_batch_that_is_learnt_at_a_time(
    size: int | str | None, expected: int | str | None
) -> None:
    data = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "d", "batch_size": 16}
    older = {
        "model": {},
        "train_input": {**data, "micro_batch_size": size},
        "eval_input": {**data, "micro_batch_size": size},
        "runconfig": {"max_steps": 3},
    }
    [config] = parse(older)
    assert config.init.loop is not None and config.init.loop.micro_batch_size == expected
    assert config.fit is not None and "micro_batch_size" not in config.fit.train_dataloader.options
