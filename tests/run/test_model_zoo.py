"""What Model Zoo files hold beyond rarefy's own keys, and the models that are refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from rarefy.errors import ConfigError
from rarefy.run.model_zoo import drop_ignored
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
