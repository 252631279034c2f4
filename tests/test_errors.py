"""Messages of errors: what was given, what is allowed, what to do."""

from __future__ import annotations

import pytest

from rarefy.errors import ConfigError, RarefyError, did_you_mean, join_path


def test_config_error_is_a_rarefy_error_and_a_value_error():
    assert issubclass(ConfigError, RarefyError) and issubclass(ConfigError, ValueError)


def test_message_has_path_value_allowed_and_example():
    error = ConfigError("update.freq", 0, "a whole number of steps ≥ 1", "freq: 100")
    assert str(error) == (
        "update.freq: 0 is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)"
    )


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ConfigError("", 0, "more"), "0 is not allowed; give more"),
        (ConfigError("a", 0, "more"), "a: 0 is not allowed; give more"),
    ],
)
def test_empty_parts_are_left_out(error, message):
    assert str(error) == message


def test_under_prefixes_a_copy():
    error = ConfigError("[1].freq", 0, "more", "freq: 1")
    moved = error.under("trainer.init.sparsity")
    assert (error.path, moved.path) == ("[1].freq", "trainer.init.sparsity[1].freq")
    assert (moved.given, moved.allowed, moved.fix) == (error.given, error.allowed, error.fix)
    assert ConfigError("", 0, "more").under("sparsity").path == "sparsity"


@pytest.mark.parametrize(
    ("prefix", "path", "joined"),
    [("a", "b", "a.b"), ("a", "[0]", "a[0]"), ("", "b", "b"), ("a", "", "a"), ("", "", "")],
)
def test_join_path(prefix, path, joined):
    assert join_path(prefix, path) == joined


def test_did_you_mean_is_blind_to_case_and_lists_all_when_nothing_is_near():
    assert did_you_mean("SPARSTY", ["sparsity", "seed"]) == "did you mean sparsity?"
    assert did_you_mean("zzz", ["sparsity", "seed"]) == "one of seed, sparsity"


@pytest.mark.parametrize(("given", "shown"), [(None, "null"), (True, "true"), (False, "false"), (1, "1")])
def test_a_value_is_shown_as_yaml_writes_it(given: object, shown: str) -> None:
    assert str(ConfigError("here", given, "others")) == f"here: {shown} is not allowed; give others"
