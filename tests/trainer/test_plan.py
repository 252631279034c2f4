"""How long a run is, and what falls due when."""

import pytest

from rarefy.errors import ConfigError
from rarefy.trainer.plan import LoggingConfig, LoopConfig, RunPlan, plan_run
from rarefy.validation.block import read_block


def plan(loop: dict, start: int = 0, steps_per_epoch: int | None = None) -> RunPlan:
    return plan_run(LoopConfig(**loop), start, steps_per_epoch, log_every=10, save_every=None)


@pytest.mark.parametrize(
    ("loop", "start", "per_epoch", "total"),
    [
        ({"num_steps": 7}, 0, None, 7),
        ({"num_steps": 7}, 100, 3, 7),
        ({"max_steps": 7}, 0, None, 7),
        ({"max_steps": 7}, 5, None, 2),
        ({"max_steps": 7}, 7, None, 0),
        ({"max_steps": 7}, 9, None, 0),
        ({"num_steps": 3, "max_steps": 7}, 2, None, 3),
        ({"num_steps": 9, "max_steps": 7}, 2, None, 5),
        ({"num_epochs": 2}, 0, 6, 12),
        ({"num_epochs": 2, "steps_per_epoch": 4}, 0, 6, 8),
        ({"num_epochs": 2, "steps_per_epoch": 4, "max_steps": 5}, 1, 6, 4),
        ({"num_epochs": 2, "max_steps": 5}, 0, None, 5),
    ],
)
def test_total_is_the_least_of_what_is_given(
    loop: dict, start: int, per_epoch: int | None, total: int
) -> None:
    assert plan(loop, start, per_epoch).stop == start + total


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ({}, "loop: a run without a length is not allowed; give num_steps, max_steps or num_epochs"),
        ({"steps_per_epoch": 4}, "loop: a run without a length"),
        ({"num_epochs": 2}, "loop: num_epochs for data of unknown length without steps_per_epoch"),
    ],
)
def test_a_run_needs_a_length(loop: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        plan(loop)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("frequency", "steps"),
    [
        (1.0, [10]),
        (0.25, [3, 6, 9, 10]),
        (0.5, [5, 10]),
        (0.001, list(range(1, 11))),
        (1, list(range(1, 11))),
        (4, [4, 8, 10]),
        (100, [10]),
        (0, []),
        (0.0, []),
        (None, []),
    ],
)
def test_eval_frequency(frequency: float | None, steps: list[int]) -> None:
    made = plan({"num_steps": 10, "eval_frequency": frequency})
    assert [step for step in range(11) if made.validates_at(step)] == steps


def test_eval_frequency_counts_from_where_the_fit_began() -> None:
    made = plan({"num_steps": 10, "eval_frequency": 4}, start=5)
    assert [step for step in range(16) if made.validates_at(step)][-3:] == [9, 13, 15]


def test_logs_and_checkpoints_count_global_steps_and_include_the_last() -> None:
    made = RunPlan(start=3, stop=11, eval_every=None, log_every=5, save_every=4)
    assert [step for step in range(4, 12) if made.logs_at(step)] == [5, 10, 11]
    assert [step for step in range(4, 12) if made.saves_at(step)] == [4, 8, 11]


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        (
            {"num_epochs": 1, "num_steps": 5},
            "loop.num_epochs: 1 beside num_steps is not allowed; give one of the two",
        ),
        ({"num_step": 5}, "did you mean num_steps?"),
        ({"num_steps": 0}, "loop.num_steps: 0 is not allowed; give a whole number of steps ≥ 1"),
        ({"max_steps": 2.5}, "loop.max_steps: 2.5"),
        ({"num_epochs": 0}, "loop.num_epochs: 0"),
        ({"eval_steps": -1}, "loop.eval_steps: -1"),
        ({"grad_accum_steps": 0}, "loop.grad_accum_steps: 0"),
        ({"eval_frequency": -1}, "loop.eval_frequency: -1"),
        ({"eval_frequency": 1.5}, "loop.eval_frequency: 1.5"),
        ({"eval_frequency": float("nan")}, "loop.eval_frequency: nan"),
        ({"eval_frequency": True}, "loop.eval_frequency: true"),
        ({"max_skipped_steps": 0}, "loop.max_skipped_steps: 0"),
    ],
)
def test_bad_values_are_named(loop: dict, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        read_block(LoopConfig, loop, "loop")
    assert message in str(error.value)


def test_blocks_may_be_instances_mappings_or_absent() -> None:
    block = LoopConfig(num_steps=3)
    assert read_block(LoopConfig, block, "loop") is block
    assert read_block(LoopConfig, {"num_steps": 3}, "loop") == block
    assert read_block(LoggingConfig, None, "logging").log_steps == 10
    with pytest.raises(ConfigError, match=r"loop: 5 is not allowed; give a mapping, or LoopConfig\(...\)"):
        read_block(LoopConfig, 5, "loop")  # type: ignore[arg-type]


def test_log_level_is_case_insensitive() -> None:
    assert read_block(LoggingConfig, {"log_level": "verbose"}, "logging").log_level == "VERBOSE"
    with pytest.raises(ConfigError, match=r"logging.log_level: 'LOUD'"):
        read_block(LoggingConfig, {"log_level": "loud"}, "logging")
