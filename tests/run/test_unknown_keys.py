"""All unknown keys of a file are told at once."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.errors import ConfigError
from rarefy.run.schema import parse

DATA = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": "d", "batch_size": 2}


def refused(trainer: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as error:
        parse({"trainer": trainer})
    return str(error.value)


def test_one_has_the_message_of_one() -> None:
    message = refused({"init": {"model": {"name": "gpt2", "hiden_size": 3}}})
    assert message == (
        "trainer.init.model: the key 'hiden_size' is not allowed; give a known key (did you mean hidden_size?)"
    )


def test_several_are_one_message() -> None:
    data = {**DATA, "batchsize": 3}
    message = refused(
        {
            "init": {
                "model": {"name": "gpt2", "hiden_size": 3, "nothing_like_it": 1},
                "loop": {"num_step": 3},
            },
            "fit": {"train_dataloader": data, "val_dataloader": data},
            "validate": {"val_dataloader": data},
        }
    )
    assert message.startswith("trainer: 4 unknown keys (")
    for part in (
        "init.loop.num_step (did you mean num_steps?)",
        "init.model.hiden_size (did you mean hidden_size?)",
        "init.model.nothing_like_it,",
        "fit.train_dataloader.batchsize (did you mean batch_size?)",
    ):
        assert part in message


def test_unknown_keys_come_before_wrong_values() -> None:
    assert "the key 'modle'" in refused({"init": {"model": {"name": "gpt2"}, "modle": 1, "seed": -1}})


def test_models_and_data_of_the_users_own_have_any_keys() -> None:
    data = {"data_processor": "mine:data", "anything": 1}
    model = {"name": "mine:Model", "width": 3}
    [read] = parse({"trainer": {"init": {"model": model}, "fit": {"train_dataloader": data}}})
    fit: Any = read.blocks.fit
    assert read.init.model.model_extra == {"width": 3}
    assert fit.train_dataloader.model_extra == {"anything": 1}


def test_keys_of_the_model_zoo_are_known_where_they_say_nothing() -> None:
    model = {"name": "gpt2", "attention_softmax_fp32": True, "fold_rope_consts": False}
    [read] = parse({"trainer": {"init": {"model": model}}})
    assert read.init.model.name == "gpt2"
    assert "attention_softmax_fp33" in refused({"init": {"model": {**model, "attention_softmax_fp33": True}}})


def test_a_hint_is_a_slip_and_no_other_meaning() -> None:
    message = refused({"init": {"model": {"name": "gpt2", "mode_of_rotation": True}}})
    assert "did you mean" not in message and "none of the" in message
