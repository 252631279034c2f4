"""What an algorithm's options may be: the type of each stands in its constructor, and everything else follows from it.

    def __init__(self, sparsity: Sparsity, *, drop_fraction: FractionSchedule = 0.3, ...)

The checks of a `sparsity:` block, its JSON schema and the guide read these types with `options_of`, so an option of
a new algorithm is described where it is taken and nowhere else.
"""

from __future__ import annotations

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

from rarefy.algorithms.option_checks import (
    check_factor,
    check_flag,
    check_fraction,
    compute_schema,
    parse_fraction,
)
from rarefy.distributions import DISTRIBUTIONS
from rarefy.first_masks.names import first_masks_schema
from rarefy.optim.density_scaling import PARAMETRIZATIONS
from rarefy.patterns.structures import BLOCK_SCORES
from rarefy.schedule_schema import Json, schedule_schema, update_schema
from rarefy.schedules import parse_update_schedule
from rarefy.validation import StepMark, marks_in

IMPORT_PATH: Json = {"type": "string", "pattern": ":", "description": "package.module:Name or ./file.py:Name"}


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
Compute = Annotated[Any, OptionType(compute_schema)]
"""`auto`, `masked`, `compact` or `{compact: half}`: how the weights are stored."""
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
        # A class of somebody else may be changed in place, as notebooks do it.
        is_ours = base.__module__.partition(".")[0] == __name__.partition(".")[0]
        fields, passes_on = (_known_fields_of if is_ours else _fields_of)(base)
        found |= {name: one for name, one in fields.items() if name not in found}
        # Without `**options` nothing is passed on to the bases.
        if not passes_on:
            break
    return found


def _fields_of(base: type) -> tuple[dict[str, OptionField], bool]:
    """What the constructor in a class itself names, and whether it takes `**options` for its base."""
    # Of the function in the class itself, so with `self`.
    parameters = list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]
    hints = _hints_of(vars(base)["__init__"])
    words = _descriptions_of(base)
    found = {}
    for one in parameters:
        if one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL):
            hint = hints.get(one.name)
            types = next(marks_in(hint, OptionType), None), next(marks_in(hint, StepMark), None)
            found[one.name] = OptionField(one.name, one.default, *types, words.get(one.name, ""))
    return found, any(one.kind is one.VAR_KEYWORD for one in parameters)


# A block is checked against all algorithms, whose constructors take milliseconds each to read.
_known_fields_of = functools.cache(_fields_of)


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
