"""Options are described where they are taken: refusals, percentages and the schema follow from their types."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import pytest
from pydantic.dataclasses import dataclass

import rarefy
from rarefy.algorithms.option_checks import check_factor, check_fraction, parse_fraction
from rarefy.algorithms.options import Fraction, FractionSchedule, OptionField, options_of
from rarefy.errors import ConfigError
from rarefy.methods.registry import ALGORITHMS
from rarefy.run.sparsity_schema import sparsity_schema
from rarefy.schedule_schema import schedule_schema
from rarefy.schedules import SCHEDULES, step_keys
from rarefy.validation import Level, Number, Step, StepCount, StepMark

if TYPE_CHECKING:
    from nowhere import Missing  # type: ignore[import-not-found]


class Dampened(rarefy.SET):
    """A method with options of its own.

    Args:
        dampening: how much
            of it.
        warmth: when.
    """

    def __init__(
        self,
        sparsity: Any,
        *,
        dampening: Fraction = 0.5,
        heat: FractionSchedule = 0.1,
        warmth: StepCount | None = None,
        begin: Step = 0,
        free: Any = None,
        **options: Any,
    ) -> None:
        super().__init__(sparsity, **options)
        self.dampening, self.heat, self.free = dampening, heat, free
        self.warmth, self.begin = warmth, begin


class Unreadable(rarefy.SET):
    def __init__(self, sparsity: Missing, **options: Any) -> None:
        super().__init__(sparsity, **options)


def configured(**options: Any) -> Any:
    block = {"algorithm": Dampened, "sparsity": 0.5, **options}
    return rarefy.configure(block, num_steps=40, path="trainer.init.sparsity")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dampening": 50}, "trainer.init.sparsity.dampening: 50 is not allowed; give a fraction in [0, 1]"),
        (
            {"dampening": [0.5, 0.1]},
            "trainer.init.sparsity.dampening: [0.5, 0.1] is not allowed; give a number",
        ),
        ({"heat": -1}, "trainer.init.sparsity.heat: -1 is not allowed; give a fraction in [0, 1]"),
        (
            {"heat": {"type": "power", "init": 3, "beta": 0.9}},
            "trainer.init.sparsity.heat.init: 3 is not allowed; give a fraction in [0, 1]",
        ),
    ],
)
def test_an_option_is_checked_because_its_type_says_so(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        configured(**options)
    assert str(caught.value).startswith(message)


def test_an_option_that_is_a_number_of_steps_may_be_a_part_of_the_run() -> None:
    made = configured(
        warmth="1%", begin="1%", free="75%", heat={"type": "cosine", "init": 1, "half_period": "50%"}
    )
    assert (made.warmth, made.begin, made.free) == (1, 0, "75%")
    assert made.heat["half_period"] == 20


def test_a_custom_class_keeps_the_values_that_were_written() -> None:
    made = configured(dampening=0.25, heat=[0.1, 0.2])
    assert (made.dampening, made.heat) == (0.25, [0.1, 0.2])


def test_options_come_with_default_and_description() -> None:
    options = options_of(Dampened)
    assert list(options)[:3] == ["sparsity", "dampening", "heat"]
    assert options["dampening"].description == "how much of it."
    assert options["sparsity"].default is inspect.Parameter.empty
    assert options["begin"].steps == StepMark(0)
    assert options["free"] == OptionField("free", None, None, None, "")
    assert options["drop_fraction"].description.startswith("share of the active connections")


def test_types_that_cannot_be_read_check_nothing() -> None:
    assert options_of(Unreadable)["sparsity"].type is None
    assert rarefy.configure({"algorithm": Unreadable, "sparsity": 0.5}).algorithms[0].name == "set"


def test_a_class_that_is_changed_in_place_takes_what_it_now_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """As notebooks do it with a class whose file has changed."""
    assert "cooling" not in options_of(Unreadable)

    def construct(self: Any, sparsity: Any, cooling: int = 3, **options: Any) -> None:
        rarefy.SET.__init__(self, sparsity, **options)

    monkeypatch.setattr(Unreadable, "__init__", construct)
    assert options_of(Unreadable)["cooling"].default == 3
    rarefy.configure({"algorithm": Unreadable, "sparsity": 0.5, "cooling": 4})


def test_every_option_of_every_algorithm_has_a_type_and_a_description() -> None:
    for kind in ALGORITHMS.values():
        for option in options_of(kind).values():
            assert option.type is not None and option.description, option


def test_the_schema_says_what_an_option_does() -> None:
    known = sparsity_schema()["anyOf"][1]["properties"]
    assert known["distribution"]["default"] == "uniform"
    # Of granet it is another one.
    assert "default" not in known["drop_fraction"]
    assert known["drop_fraction"]["description"].startswith("share of the active connections")
    assert known["compute"]["description"].startswith("`auto`, `masked`, ")
    assert "auto" in known["compute"]["anyOf"][0]["enum"]


def test_a_new_schedule_is_checked_by_the_types_of_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Sawtooth:
        top: Level
        slope: Number
        every: StepCount

        def __call__(self, step: int, update: int = 0) -> float:
            return self.top

    monkeypatch.setitem(SCHEDULES, "sawtooth", Sawtooth)  # type: ignore[arg-type]
    step_keys.cache_clear()
    with pytest.raises(
        ConfigError, match=r"drop_fraction\.top: 5 is not allowed; give a fraction in \[0, 1\]"
    ):
        parse_fraction({"type": "sawtooth", "top": 5, "slope": 7, "every": 3}, "drop_fraction")
    assert step_keys()["every"] == StepMark(1)
    [form] = [one for one in schedule_schema()["anyOf"] if one.get("properties", {}).get("top")]
    assert {"type": "string"}.items() <= form["properties"]["every"]["anyOf"][1].items()
    monkeypatch.undo()
    step_keys.cache_clear()


def test_check_fraction() -> None:
    assert check_fraction(1, "x") == 1.0
    with pytest.raises(ConfigError, match=r"x: 2 is not allowed"):
        check_fraction(2, "x")


@pytest.mark.parametrize("value", [-0.1, "much", True, None, float("nan"), float("inf"), [1.0]])
def test_check_factor(value: Any) -> None:
    assert check_factor(2, "x") == 2.0
    with pytest.raises(ConfigError, match=r"x: .+ is not allowed; give a number ≥ 0 \(example: x: 1.0\)"):
        check_factor(value, "x")
