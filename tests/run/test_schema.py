"""The whole configuration file: what is accepted, and one line for everything else."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

from rarefy.errors import ConfigError
from rarefy.run.schema import OVERLAY_BLOCKS, json_schema, parse
from rarefy.yaml_files.yaml_file import load_text

MINIMAL = "trainer: {init: {model: {name: gpt2}}}"


def test_defaults() -> None:
    [one] = parse(load_text(MINIMAL))
    assert one.path == "trainer"
    assert one.init.model.name == "gpt2"
    assert one.init.model.options == {}
    assert (one.init.model_dir, one.init.requested_device) == ("./model_dir", "auto")
    assert one.init.callbacks == one.init.loggers == one.init.schedulers == []
    assert one.fit is one.validation is one.validate_all is one.init.sparsity is None
    assert one.content == {"init": {"model": {"name": "gpt2"}}}


def test_every_block() -> None:
    [one] = parse(
        load_text(
            """
            trainer:
              init:
                model: {name: gpt2, hidden_size: 8}
                device: CPU
                optimizer: {AdamW: {lr: 6e-4}}
                schedulers: [{ConstantLR: {val: 1e-3}}]
                precision: {enabled: false}
                sparsity: 0.9
                loop: {num_steps: 5}
                checkpoint: {steps: 2}
                logging: {log_steps: 3, log_level: debug}
                callbacks: [{LogSparsity: {}}, {Checkpoint: null}]
                loggers: {CSVLogger: {}, TensorBoardLogger: null}
                seed: 3
              fit:
                train_dataloader: {data_processor: A, batch_size: 2}
                val_dataloader: {data_processor: B}
                ckpt_path: null
              validate: {val_dataloader: {data_processor: B}, ckpt_path: x}
              validate_all: {val_dataloaders: [{data_processor: B}], ckpt_paths: y}
            """
        )
    )
    init, fit = one.init, one.fit
    assert fit is not None and one.validation is not None and one.validate_all is not None
    assert init.model.options == {"hidden_size": 8}
    assert init.requested_device == "cpu"
    assert init.optimizer == {"AdamW": {"lr": 6e-4}}
    assert init.logging.log_level == "DEBUG"
    assert init.callbacks == [{"LogSparsity": {}}, {"Checkpoint": None}]
    assert init.loggers == [{"CSVLogger": {}}, {"TensorBoardLogger": None}]
    assert fit.train_dataloader.options == {"data_processor": "A", "batch_size": 2}
    assert [block.data_processor for block in fit.val_dataloader] == ["B"]
    assert "ckpt_path" in fit.model_fields_set
    assert one.validation.ckpt_path == "x"
    assert one.validate_all.ckpt_paths == ["y"]


def test_the_three_states_of_ckpt_path() -> None:
    text = "trainer: {init: {model: {name: a}}, fit: {train_dataloader: {data_processor: A}%s}}"
    states = []
    for given in ("", ", ckpt_path: null", ", ckpt_path: x"):
        fit = parse(load_text(text % given))[0].fit
        assert fit is not None
        states.append(("ckpt_path" in fit.model_fields_set, fit.ckpt_path))
    assert states == [(False, None), (True, None), (True, "x")]


def test_empty_keys_count_as_absent() -> None:
    [one] = parse(load_text("trainer: {init: {model: {name: a}, loop: , callbacks: , seed: }, fit: }"))
    assert one.init.loop is None
    assert one.init.callbacks == []
    assert one.fit is None


def test_a_list_of_trainers() -> None:
    entry = MINIMAL.replace("gpt2", "%s")
    both = parse(load_text(f"trainer: [{{{entry % 'a'}}}, {{{entry % 'b'}}}]"))
    assert [(one.path, one.init.model.name) for one in both] == [
        ("trainer[0].trainer", "a"),
        ("trainer[1].trainer", "b"),
    ]


@pytest.mark.parametrize("key", ["device: CSX", "backend: {backend_type: CSX}"])
def test_csx_is_kept_for_the_builder(key: str) -> None:
    [one] = parse(load_text(f"trainer: {{init: {{model: {{name: a}}, {key}}}}}"))
    assert one.init.requested_device == "csx"


def test_what_only_cerebras_understands_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    text = """
        trainer:
          init:
            model: {name: a}
            backend: {backend_type: CSX, cluster_config: {num_csx: 1}, compile_dir: x}
            logging: {wsc_log_level: INFO}
        """
    with caplog.at_level(logging.WARNING, "rarefy"):
        [one] = parse(load_text(text))
    [message] = [record.getMessage() for record in caplog.records]
    for path in (
        "backend.cluster_config",
        "backend.compile_dir",
        "logging.wsc_log_level",
    ):
        assert f"trainer.init.{path}" in message
    assert one.init.backend is not None


INIT_FAULTS = [
    ("loop: {num_steps: 0}", "loop.num_steps: 0 is not allowed; give a whole number of steps ≥ 1"),
    (
        "loop: {num_stps: 1}",
        "loop: the key 'num_stps' is not allowed; give a known key (did you mean num_steps?)",
    ),
    ("loop: 3", "loop: 3 is not allowed; give a mapping of loop options (example: loop: {num_steps: 1000})"),
    ("loop: {num_steps: 1, num_epochs: 1}", "loop.num_epochs: 1 beside num_steps is not allowed"),
    ("lop: {num_steps: 0}", "init: the key 'lop' is not allowed; give a known key (did you mean loop?)"),
    ("model: {nam: gpt2}", "model.name: a missing value is not allowed; give a model's name or import path"),
    ("model: {name: 3}", "model.name: 3 is not allowed"),
    ("model: {name: a, null: 4}", "model: the key null is not allowed; give words as keys"),
    ("model: {name: a, 3: 4}", "model: the key 3 is not allowed; give words as keys"),
    ("model:", "model: a missing value is not allowed"),
    (
        "optimizer: {a: {}, b: {}}",
        "optimizer: {'a': {}, 'b': {}} is not allowed; give a mapping of one optimizer",
    ),
    ("optimizer: AdamW", "optimizer: 'AdamW' is not allowed; give a mapping of one optimizer"),
    ("optimizer: {a: 3}", "optimizer.a: 3 is not allowed; give a mapping"),
    ("callbacks: [3]", "callbacks[0]: 3 is not allowed; give a list of maps from one callback"),
    ("callbacks: 3", "callbacks: 3 is not allowed; give a list of maps from one callback"),
    ("callbacks: {A: {}, B: 2}", "callbacks.B: 2 is not allowed; give a mapping"),
    ("seed: true", "seed: true is not allowed; give a whole number ≥ 0"),
    ("seed: -1", "seed: -1 is not allowed"),
    ("seed: 1.0", "seed: 1.0 is not allowed"),
    ("device: tpu", "device: 'tpu' is not allowed; give cpu, gpu or auto (example: device: auto)"),
    ("model_dir: 3", "model_dir: 3 is not allowed; give a directory"),
    ("logging: {log_steps: 1.5}", "logging.log_steps: 1.5 is not allowed"),
    ("logging: {log_level: loud}", "logging.log_level: 'LOUD' is not allowed; give DEBUG, VERBOSE"),
    ("checkpoint: {steps: 0}", "checkpoint.steps: 0 is not allowed; give a"),
    ("precision: {fp16_type: int8}", "precision.fp16_type: 'int8' is not allowed; give bfloat16"),
    ("precision: {max_gradient_norm: 1, max_gradient_value: 1}", "precision.max_gradient_value: 1.0 beside"),
    ("backend: {backend_type: CPU, colour: red}", "backend: the key 'colour' is not allowed"),
]


@pytest.mark.parametrize(("key", "message"), INIT_FAULTS)
def test_faults_in_init(key: str, message: str) -> None:
    model = "" if key.startswith("model:") else "model: {name: gpt2}, "
    line = _refused(f"trainer: {{init: {{{model}{key}}}}}")
    assert line.startswith(
        f"trainer.init{'' if message.startswith('init') else '.'}{message.removeprefix('init')}"
    )


FIT_FAULTS = [
    ("fit: {}", "fit.train_dataloader: a missing value is not allowed"),
    (
        "fit: {train_dataloader: 3}",
        "fit.train_dataloader: 3 is not allowed; give a mapping with `data_processor`",
    ),
    ("fit: {train_dataloader: {}}", "fit.train_dataloader.data_processor: a missing value"),
    (
        "fit: {train_dataloader: {data_processor: a}, val_dataloader: {data_processor: 3}}",
        "fit.val_dataloader.data_processor: 3 is not allowed",
    ),
    (
        "fit: {train_dataloader: {data_processor: a}, val_dataloader: [{data_processor: a}, {}]}",
        "fit.val_dataloader[1].data_processor: a missing value",
    ),
    ("fit: {train_dataloader: {data_processor: a}, ckpt_path: 3}", "fit.ckpt_path: 3 is not allowed"),
    ("validat: {}", ": the key 'validat' is not allowed; give a known key (did you mean validate?)"),
    ("validate: {val_dataloader: 3}", "validate.val_dataloader: 3 is not allowed"),
    ("validate: {val_dataloadr: 3}", "validate: the key 'val_dataloadr' is not allowed"),
    ("validate_all: {val_dataloaders: [], ckpt_paths: [3]}", "validate_all.ckpt_paths[0]: 3 is not allowed"),
]


@pytest.mark.parametrize(("key", "message"), FIT_FAULTS)
def test_faults_beside_init(key: str, message: str) -> None:
    line = _refused(f"trainer: {{init: {{model: {{name: gpt2}}}}, {key}}}")
    assert line.startswith(f"trainer{message}" if message.startswith(":") else f"trainer.{message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "trainer: {init: {model: {name: a}, schedulers: [{A: {x: .nan}}]}}",
            "trainer.init.schedulers[0].A.x: nan is not allowed; give a number",
        ),
        ("trainer: 3", "trainer: 3 is not allowed; give a mapping with `init`"),
        ("trainer:", "trainer: null is not allowed"),
        ("trainer: {}", "trainer.init: a missing value is not allowed"),
        ("{}", "a file without keys is not allowed; give the key `trainer`"),
        ("trianer: {}", "the key 'trianer' is not allowed; give the key `trainer`"),
        ("trainer: {}\nother: 3", "the key 'other' beside `trainer` is not allowed"),
        ("trainer: []", "trainer: an empty list is not allowed"),
        ("trainer: [3]", "trainer[0]: 3 is not allowed; give a mapping with the single key `trainer`"),
        ("trainer: [{trainer: {init: {model: {name: 3}}}}]", "trainer[0].trainer.init.model.name: 3 is not"),
        ("trainer: [{trainer: 3}]", "trainer[0].trainer: 3 is not allowed"),
    ],
)
def test_faults_at_the_top(text: str, message: str) -> None:
    assert _refused(text).startswith(message)


def test_the_older_form_is_converted_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    older = {
        "model": {"name": "gpt3"},
        "runconfig": {"max_steps": 7, "num_csx": 2},
        "train_input": {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "d", "batch_size": 2},
    }
    [one] = parse(older)
    assert one.init.model.name == "gpt3"
    assert one.init.loop is not None and one.init.loop.max_steps == 7
    assert one.fit is not None and one.fit.train_dataloader.data_processor == "GptHDF5MapDataProcessor"
    assert len(caplog.messages) == 1
    assert "has the older form and runs as its new one, which `rarefy convert` writes" in caplog.text
    assert "left out, no use for runconfig.num_csx" in caplog.text


def test_json_schema_has_every_block() -> None:
    schema: dict[str, Any] = json.loads(json.dumps(json_schema()))
    assert schema["required"] == ["trainer"]
    assert set(schema["$defs"]) >= {"TrainerBlock", "InitBlock", "FitBlock", "LoopConfig", "CheckpointConfig"}
    assert set(schema["$defs"]["TrainerBlock"]["properties"]) == {"init", "fit", "validate", "validate_all"}
    assert schema["$defs"]["InitBlock"]["additionalProperties"] is False


def test_blocks_that_set_may_create() -> None:
    assert {"init", "fit", "validate", "validate_all", "loop", "checkpoint", "logging"} <= OVERLAY_BLOCKS


def _refused(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(load_text(text))
    assert "\n" not in str(caught.value)
    return str(caught.value)
