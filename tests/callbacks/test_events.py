"""The hooks: all documented in the pseudocode, none does anything by itself."""

import inspect
import re
from typing import Any

import pytest

from rarefy.callbacks import events
from rarefy.callbacks.events import Callback, Logger

HOOKS = {
    name: hook
    for name, hook in vars(Callback).items()
    if inspect.isfunction(hook) and not name.startswith("_")
}
EXPECTED = [
    "setup",
    "on_fit_start",
    "on_train_start",
    "on_train_batch_start",
    "on_before_forward",
    "on_after_forward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_after_optimizer_step",
    "on_train_batch_end",
    "on_validate_start",
    "on_validate_batch_end",
    "on_validate_end",
    "on_save_checkpoint",
    "on_load_checkpoint",
    "on_fit_end",
]


def test_the_hooks_are_exactly_these():
    assert sorted(HOOKS) == sorted(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_hook_is_marked_in_the_pseudocode(name):
    assert re.search(rf"^ +{name}\b", events.__doc__ or "", re.MULTILINE)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_hook_does_nothing(name):
    arguments: list[Any] = [{} for _ in inspect.signature(HOOKS[name]).parameters]
    arguments[0] = Callback()
    assert HOOKS[name](*arguments) is None
    assert arguments[1:] == [{}] * (len(arguments) - 1)


def test_a_logger_must_say_how_it_logs():
    trainer: Any = None
    with pytest.raises(NotImplementedError):
        Logger().log(trainer, {"loss": 1.0}, 1)
