"""What Model Zoo files hold beyond rarefy's own keys, and the models that are refused."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from rarefy.errors import ConfigError
from rarefy.run.builder import Builder
from rarefy.run.model_zoo import drop_ignored, is_for_cerebras
from rarefy.run.schema import parse


def test_drop_ignored_leaves_malformed_blocks_and_the_given_mapping() -> None:
    given = {"backend": 3, "precision": {"precision_opt_level": 1}}
    rest, dropped = drop_ignored(given, "trainer.init")
    assert rest == {"backend": 3, "precision": {}}
    assert dropped == ["trainer.init.precision.precision_opt_level"]
    assert given["precision"] == {"precision_opt_level": 1}


def test_defaults_of_the_model_zoo_are_taken_without_a_word(caplog: pytest.LogCaptureFixture) -> None:
    init: dict[str, Any] = {
        "model": {"name": "gpt2"},
        "backend": {"backend_type": "CSX", "cluster_config": None},
        "precision": {"min_loss_scale": None, "initial_loss_scale": None, "log_loss_scale": None},
        "checkpoint": {"strict_version": True, "checkpoint_name": "checkpoint_{step}.mdl"},
        "logging": {"enable_act_frequency": False, "wsc_log_level": None},
        "autorestart": None,
    }
    with caplog.at_level(logging.INFO):
        parse({"trainer": {"init": init}})
    assert not caplog.records


def test_what_only_their_system_has_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    init: dict[str, Any] = {
        "model": {"name": "gpt2"},
        "backend": {"csx.debug.implicit_cast_cb16_to_fp32": True, "num_csx": 4},
        "precision": {"min_loss_scale": 1.0},
        "autorestart": {"max_num_restarts": 3},
    }
    parse({"trainer": {"init": init}})
    [message] = caplog.messages
    for key in ("autorestart", "backend.csx.debug.implicit_cast_cb16_to_fp32", "backend.num_csx"):
        assert f"trainer.init.{key}" in message
    assert "precision.min_loss_scale" in message


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bert/classifier", "an encoder"),
        ("t5", "an encoder with a decoder"),
        ("vision_transformer", "a vision model"),
        ("llava", "a multimodal model"),
        ("dpo", "preference training"),
    ],
)
def test_other_kinds_of_models_are_refused_before_anything_else(name: str, kind: str) -> None:
    init: dict[str, Any] = {"model": {"name": name, "image_model": {}}, "lop": {}, "sparsity": 7}
    with pytest.raises(ConfigError) as error:
        parse({"trainer": {"init": init, "fti": {}}})
    start = f"trainer.init.model.name: {name!r}, {kind} of the Model Zoo, is not allowed; give a decoder"
    assert str(error.value).startswith(start)


@pytest.mark.parametrize(
    "init",
    [
        {"backend": {"backend_type": "CSX"}},
        {"device": "CSX"},
        {"device": "csx"},
        {"backend": {"backend_type": "csx"}},
        {"backend": {"cluster_config": None}},
        {"precision": {"csx.anything": 1}},
        {"checkpoint": {"strict_version": True}},
        {"autorestart": None},
        {"callbacks": [{"GlobalFlags": {}}]},
    ],
)
def test_a_file_for_a_cerebras_system_is_known_by_what_only_that_has(init: dict[str, Any]) -> None:
    assert is_for_cerebras(init)


@pytest.mark.parametrize(
    "init",
    [None, 3, {}, {"backend": 3, "callbacks": [3, {"LogSparsity": {}}]}, {"loggers": {"GlobalFlags": 1}}],
)
def test_other_files_are_not(init: Any) -> None:
    assert not is_for_cerebras(init)


@pytest.mark.parametrize("name", ["WandbLogger", "wandblogger"])
def test_a_logger_without_its_package(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file for a Cerebras system runs unedited; in any other the logger was asked for."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    init: dict[str, Any] = {
        "model": {"name": "gpt2"},
        "loggers": [{name: {"project": "p"}}, {"CSVLogger": {}}],
    }
    [ours] = parse({"trainer": {"init": init}})
    with pytest.raises(ConfigError, match=r"loggers\[0\].*pip install 'rarefy\[wandb\]'"):
        Builder(ours, tmp_path).check()
    [theirs] = parse({"trainer": {"init": {**init, "backend": {"backend_type": "CSX"}}}})
    caplog.clear()
    kinds = [type(one).__name__ for one in Builder(theirs, tmp_path).loggers]
    assert "WandbLogger" not in kinds and "CSVLogger" in kinds
    line = f"trainer.init.loggers: {name} left out; pip install 'rarefy[wandb]' brings it in"
    assert caplog.messages.count(line) == 1
