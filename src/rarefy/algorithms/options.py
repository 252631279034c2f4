"""What an algorithm's options may be: the type of each stands in its constructor, and everything else follows from it.

    def __init__(self, sparsity: Sparsity, *, drop_fraction: FractionSchedule = 0.3, ...)

The checks of a `sparsity:` block, its JSON schema and the guide read these types with `options_of`, so an option of
a new algorithm is described where it is taken and nowhere else.
"""

from __future__ import annotations

import inspect
import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from rarefy.distributions import DISTRIBUTIONS, GLOBAL
from rarefy.errors import ConfigError, join_path
from rarefy.first_masks.names import first_masks_schema
from rarefy.optim.density_scaling import PARAMETRIZATIONS
from rarefy.patterns.constant_fan import ConstantFan
from rarefy.patterns.structures import BLOCK_SCORES, TOLERANCE, NOfM, Structure
from rarefy.schedule_schema import Json, schedule_schema, update_schema
from rarefy.schedules import Constant, Cycling, Schedule, parse_schedule, parse_update_schedule
from rarefy.validation import LevelMark, StepMark, marked_fields, marks_in, shorten
from rarefy.validation.numerals import read_number

COMPUTE = ("auto", "masked", "compact")
IMPORT_PATH: Json = {"type": "string", "pattern": ":", "description": "package.module:Name or ./file.py:Name"}


def parse_fraction(value: Any, path: str, *, below_one: bool = False) -> Schedule:
    """A schedule of fractions, every written number of which lies in [0, 1].

    Args:
        value: a number, list, dict, schedule or function.
        path: name of the option.
        below_one: whether numbers that hold as they are must stay below 1.

    Raises:
        ConfigError: no schedule, or a number out of range.

    Example:
        >>> parse_fraction(0.9, "sparsity")(0)
        0.9
    """
    schedule = parse_schedule(value, path=path)
    literal = below_one and isinstance(schedule, Constant | Cycling)
    for name, number in _written_numbers(schedule):
        if not 0 <= number <= 1 or (literal and number == 1):
            raise _out_of_range(join_path(path, name), number, literal)
    return schedule


def highest_number(schedule: Schedule) -> float:
    """The highest fraction that is written in a schedule; 0 for a function, which does not tell.

    Example:
        >>> highest_number(Cycling([0.5, 0.9]))
        0.9
    """
    return max((number for _, number in _written_numbers(schedule)), default=0.0)


def _written_numbers(schedule: Schedule) -> list[tuple[str, float]]:
    """The numbers of a schedule that stand on its own scale, by the path of each."""
    if isinstance(schedule, Cycling):
        return [(f"[{index}]", number) for index, number in enumerate(schedule.values)]
    names = marked_fields(type(schedule), LevelMark)
    return [("" if isinstance(schedule, Constant) else name, getattr(schedule, name)) for name in names]


def _out_of_range(path: str, number: float, literal: bool) -> ConfigError:
    bounds = "a fraction in [0, 1)" if literal else "a fraction in [0, 1]"
    # A percentage, most likely; 1.5 would be an odd one.
    if 2 <= number <= 100:
        return ConfigError(path, f"{number:g}", f"{bounds}; did you mean {number / 100:g}?")
    return ConfigError(path, f"{number:g}", bounds, f"{path.split('.')[-1].split('[')[0]}: 0.9")


def check_reach(sparsity: Schedule, structure: Structure, distribution: str) -> None:
    """Refuses a sparsity or a distribution that contradicts the structure.

    A constant, the largest value of a list and the `final` of a schedule must be 1 − n/m; no other number may be
    above. A schedule may come from below: each group then keeps round((1 − sparsity)·m).

    Raises:
        ConfigError: it does, with the number that fits.

    Example:
        >>> check_reach(Constant(0.9), NOfM(2, 4), "uniform")
        Traceback (most recent call last):
        rarefy.errors.ConfigError: sparsity: 0.9 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}
    """
    given = f"{distribution} with the pattern {structure}"
    if isinstance(structure, ConstantFan) and distribution == GLOBAL:
        allowed = "uniform, er or erk, as each side of every weight keeps as many"
        raise ConfigError("distribution", given, allowed)
    if not isinstance(structure, NOfM):
        return
    if distribution != "uniform":
        raise ConfigError("distribution", given, "uniform, as every weight keeps n of m")
    last = max(sparsity.values) if isinstance(sparsity, Cycling) else None
    for name, number in _written_numbers(sparsity):
        is_goal = name in ("", "final") or number == last
        if (is_goal and not structure.reached_at(number)) or number > structure.highest_sparsity + TOLERANCE:
            what = f"{'' if is_goal else 'at most '}{structure.highest_sparsity:.6g}, which is 1 − n/m for {structure}"
            raise ConfigError(join_path("sparsity", name), f"{number:g}", what)


def check_compute(value: Any) -> str:
    """The `compute` option, checked.

    Raises:
        ConfigError: an unknown value.

    Example:
        >>> check_compute("masked")
        'masked'
    """
    if value not in COMPUTE:
        raise ConfigError("compute", shorten(value), "auto, masked or compact", "compute: auto")
    return value


def check_seed(value: Any) -> int | None:
    """The `seed` option, checked.

    Raises:
        ConfigError: no whole number.

    Example:
        >>> check_seed(7)
        7
    """
    value = read_number(value, "seed")
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise ConfigError("seed", shorten(value), "a whole number", "seed: 1")
    return value


def refuse_step_keys(kind: type, options: Mapping[str, Any]) -> None:
    """Refuses `freq` and its like beside `update`, where they belong inside.

    Args:
        kind: the algorithm; a constructor of its own may take such a name.
        options: what it was given.

    Raises:
        ConfigError: one is there, with the `update` that is meant.

    Example:
        >>> refuse_step_keys(type("Mine", (), {}), {"freq": 10})
        Traceback (most recent call last):
        rarefy.errors.ConfigError: freq=10 for Mine is not allowed; give it inside update (example: update={'freq': 10})
    """
    own = {
        name
        for base in kind.__mro__
        if "__init__" in vars(base)
        for name in inspect.signature(base).parameters
    }
    given = {key: options[key] for key in ("freq", "start", "stop", "steps") if key in options.keys() - own}
    if given:
        shown = ", ".join(f"{key}={shorten(value)}" for key, value in given.items())
        raise ConfigError("", f"{shown} for {kind.__name__}", "it inside update", f"update={given}")


def require_constant(schedule: Schedule, method: str = "static") -> None:
    """Refuses a sparsity that changes with the step.

    Raises:
        ConfigError: the schedule is not constant.

    Example:
        >>> require_constant(Constant(0.9))
    """
    if not isinstance(schedule, Constant):
        allowed = f"a number in [0, 1) for {method}, or algorithm: gmp"
        raise ConfigError("sparsity", "a schedule", allowed, "sparsity: 0.9")


def refuse_constant(schedule: Schedule, method: str = "gmp") -> None:
    """Refuses a sparsity that stays the same at every step.

    Raises:
        ConfigError: the schedule is constant.

    Example:
        >>> refuse_constant(Cycling([0.5, 0.9]))
    """
    if isinstance(schedule, Constant):
        allowed = f"a schedule for {method}, or algorithm: static"
        example = "sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000}"
        raise ConfigError("sparsity", f"the constant {schedule.value:g}", allowed, example)


def check_fraction(value: Any, path: str) -> float:
    """A number in [0, 1].

    Raises:
        ConfigError: anything else.

    Example:
        >>> check_fraction(0.5, "dampening")
        0.5
    """
    schedule = parse_fraction(value, path)
    if not isinstance(schedule, Constant):
        raise ConfigError(path, shorten(value), "a number in [0, 1]", f"{path}: 0.5")
    return schedule(0)


def check_factor(value: Any, path: str) -> float:
    """A finite number ≥ 0.

    Raises:
        ConfigError: anything else.

    Example:
        >>> check_factor(2, "gradient_share")
        2.0
    """
    value = read_number(value, path)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < math.inf:
        raise ConfigError(path, shorten(value), "a number ≥ 0", f"{path}: 1.0")
    return float(value)


def check_flag(value: Any, path: str) -> bool:
    """A bool, checked.

    Raises:
        ConfigError: anything else.

    Example:
        >>> check_flag(True, "keep_rows")
        True
    """
    if not isinstance(value, bool):
        raise ConfigError(path, shorten(value), "true or false", f"{path}: true")
    return value


@dataclass(frozen=True)
class OptionType:
    """What an option may be.

    Args:
        schema: its JSON schema.
        check: refuses a value that is not allowed, given the name of the option; None where the option can only be
            checked together with others, which its algorithm then does.
    """

    schema: Callable[[], Json]
    check: Callable[[Any, str], object] | None = None


def _pattern_schema() -> Json:
    size: Json = {"type": "integer", "minimum": 1}
    pair = {"type": "array", "items": size, "minItems": 2, "maxItems": 2}
    score: Json = {"enum": list(BLOCK_SCORES), "description": "of a block, from those of its connections"}
    both: Json = {"type": "boolean", "description": "n of m outputs as well"}
    forms = ({"n": size, "m": size, "transposable": both}, {"block": pair, "score": score})
    objects = [
        {
            "type": "object",
            "properties": form,
            "required": [key for key in form if key not in ("score", "transposable")],
            "additionalProperties": False,
        }
        for form in forms
    ]
    return {"anyOf": [{"enum": ["unstructured", "fan_in", "fan_out", "diagonal"]}, *objects]}


def _filter_schema() -> Json:
    globs = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    return {"anyOf": [{"type": "string"}, globs]}


Fraction = Annotated[
    float, OptionType(lambda: {"type": "number", "minimum": 0, "maximum": 1}, check_fraction)
]
"""A number in [0, 1]."""
Factor = Annotated[float, OptionType(lambda: {"type": "number", "minimum": 0}, check_factor)]
"""A number ≥ 0."""
Flag = Annotated[bool, OptionType(lambda: {"type": "boolean"}, check_flag)]
"""True or false."""
FractionSchedule = Annotated[Any, OptionType(schedule_schema, parse_fraction)]
"""A number in [0, 1], or a schedule of such numbers."""
Sparsity = Annotated[
    Any, OptionType(schedule_schema, lambda value, path: parse_fraction(value, path, below_one=True))
]
"""A number in [0, 1), or a schedule of fractions."""
Update = Annotated[
    Any, OptionType(update_schema, lambda value, path: parse_update_schedule(value, path=path))
]
"""When masks may change: `{freq, start, stop}`, `{steps: [...]}` or None for every step."""
InitMethod = Annotated[Any, OptionType(lambda: {"anyOf": [*first_masks_schema()["anyOf"], IMPORT_PATH]})]
"""How the first mask is made: a name, a mapping with the name and its keys, a function, or its import path."""
ParamFilter = Annotated[Any, OptionType(_filter_schema)]
"""Which parameters become sparse: a glob or a list of globs."""
Groups = Annotated[
    int | None,
    OptionType(lambda: {"type": "integer", "minimum": 1, "description": "equal counts in this many groups"}),
]
"""Into how many groups a dimension is divided."""
Distribution = Annotated[str, OptionType(lambda: {"enum": list(DISTRIBUTIONS)})]
"""How the sparsity is shared out among the parameters."""
PatternForm = Annotated[Any, OptionType(_pattern_schema)]
"""`unstructured`, `fan_in`, `fan_out`, `diagonal`, `{n, m, transposable}` or `{block: [outputs, inputs], score}`."""
Compute = Annotated[str, OptionType(lambda: {"enum": list(COMPUTE)})]
"""How the weights are stored."""
Parametrization = Annotated[str, OptionType(lambda: {"enum": list(PARAMETRIZATIONS)})]
"""Whether first weights and learning rates follow the density."""
Seed = Annotated[int | None, OptionType(lambda: {"type": "integer", "minimum": 0})]
"""A whole number; None takes the seed of the run."""


@dataclass(frozen=True)
class OptionField:
    """One option of an algorithm.

    Args:
        name: as it is written in YAML.
        default: `inspect.Parameter.empty` where the option has to be given.
        type: what it may be; None where its constructor does not say, so anything is passed on.
        steps: the mark of an option that is itself a number of steps.
        description: its line in the docstring of the class that takes it.
    """

    name: str
    default: Any
    type: OptionType | None
    steps: StepMark | None
    description: str

    def check(self, value: Any) -> None:
        """Refuses a value that the type of the option rules out.

        Raises:
            ConfigError: such a value, with the name of the option.
        """
        if self.type is None or self.type.check is None:
            return
        # What is only worth a remark, the constructor remarks once more.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.type.check(value, self.name)


def options_of(kind: type) -> dict[str, OptionField]:
    """The options that an algorithm's constructor takes, its bases' included, its own first.

    Args:
        kind: the class; `**options` in its constructor are those of its base.

    Example:
        >>> from rarefy import RigL
        >>> options_of(RigL)["drop_fraction"].default, options_of(RigL)["seed"].description
        (0.3, "for everything random; None takes torch's seed when the algorithm is applied.")
    """
    found: dict[str, OptionField] = {}
    for base in inspect.getmro(kind):
        if "__init__" not in vars(base):
            continue
        # Of the function in the class itself, so with `self`.
        parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
        hints = _hints_of(vars(base)["__init__"])
        words = _descriptions_of(base)
        for one in parameters:
            if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and one.name not in found:
                hint = hints.get(one.name)
                description = words.get(one.name, "")
                types = next(marks_in(hint, OptionType), None), next(marks_in(hint, StepMark), None)
                found[one.name] = OptionField(one.name, one.default, *types, description)
        # Without `**options` nothing is passed on to the bases.
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return found


def _hints_of(constructor: Any) -> Mapping[str, Any]:
    """The types of a constructor's parameters; none where one of them is imported for type checkers only."""
    try:
        return get_type_hints(constructor, include_extras=True)
    except NameError:
        return {}


def _descriptions_of(kind: type) -> dict[str, str]:
    """The entries of `Args:` in the docstring of a class."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Args:\n")
    # An entry begins four spaces in, and its further lines eight.
    entries = re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", re.split(r"\n(?=\S)", section)[0], re.MULTILINE)
    return {name: re.sub(r"\s+", " ", text) for name, text in entries}
