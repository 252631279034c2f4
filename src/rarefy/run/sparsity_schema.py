"""The JSON schema of the `sparsity:` block, made from the schedules and the algorithms themselves."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from rarefy.algorithms.registry import ALGORITHMS
from rarefy.config import accepted_options
from rarefy.distributions import DISTRIBUTIONS
from rarefy.initializers import INITIALIZERS
from rarefy.schedules import SCHEDULES, AtSteps, EveryNSteps

Json = dict[str, Any]

_STEP_KEYS = ("freq", "start", "stop", "half_period")
_NUMBER: Json = {"type": "number"}
_PERCENT: Json = {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$", "description": "a part of the run"}
_GROUPS: Json = {"type": "integer", "minimum": 1, "description": "equal counts in this many groups"}
_IMPORT_PATH: Json = {
    "type": "string",
    "pattern": ":",
    "description": "package.module:Name or ./file.py:Name",
}


def sparsity_schema() -> Json:
    """What may stand at `sparsity:`.

    Example:
        >>> [form["type"] for form in sparsity_schema()["anyOf"]]
        ['number', 'object', 'array', 'object', 'null']
    """
    entry = _entry()
    several = {"type": "array", "items": entry, "minItems": 1}
    groups = {"type": "object", "properties": {"groups": several}, "required": ["groups"]}
    number = {**_NUMBER, "minimum": 0, "exclusiveMaximum": 1}
    return {"anyOf": [number, entry, several, groups, {"type": "null"}]}


def _entry() -> Json:
    options = _options()
    overlay = {"type": ["object", "null"], "properties": options, "additionalProperties": True}
    globs = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    overlays = {"type": "object", "additionalProperties": overlay}
    param_filter = {"anyOf": [{"type": "string"}, globs, overlays]}
    return {
        "type": "object",
        "properties": {**options, "param_filter": param_filter},
        "additionalProperties": True,
    }


def _options() -> Json:
    """The options of all registered algorithms, `param_filter` aside; others' classes may take more."""
    schedule = _schedule()
    known: Json = {
        "sparsity": schedule,
        "drop_fraction": schedule,
        "update": _update(),
        "init_method": {"anyOf": [{"enum": list(INITIALIZERS)}, _IMPORT_PATH]},
        "balance_in_groups": _GROUPS,
        "balance_out_groups": _GROUPS,
        "distribution": {"enum": list(DISTRIBUTIONS)},
        "pattern": _pattern(),
        "compute": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0},
    }
    names = {name for kind in ALGORITHMS.values() for name in accepted_options(kind)} - {"param_filter"}
    algorithm = {"anyOf": [{"enum": list(ALGORITHMS)}, _IMPORT_PATH]}
    return {"algorithm": algorithm, **{name: known.get(name, {}) for name in sorted(names)}}


def _pattern() -> Json:
    size: Json = {"type": "integer", "minimum": 1}
    pair = {"type": "array", "items": size, "minItems": 2, "maxItems": 2}
    forms = ({"n": size, "m": size}, {"block": pair})
    objects = [
        {"type": "object", "properties": form, "required": list(form), "additionalProperties": False}
        for form in forms
    ]
    return {"anyOf": [{"const": "unstructured"}, *objects]}


def _schedule() -> Json:
    forms = [_typed(name, kind) for name, kind in SCHEDULES.items()]
    return {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}, *forms]}


def _typed(name: str, kind: type) -> Json:
    schema = _with_percent(TypeAdapter(kind).json_schema())
    properties = {"type": {"const": name}, **schema["properties"]}
    return {**schema, "properties": properties, "required": ["type", *schema.get("required", [])]}


def _update() -> Json:
    forms = [_with_percent(TypeAdapter(kind).json_schema()) for kind in (EveryNSteps, AtSteps)]
    return {"anyOf": [*forms, {"type": "null"}]}


def _with_percent(schema: Json) -> Json:
    """A dataclass's schema whose steps may also be percentages, without the docstring's examples."""
    properties = {
        name: {"anyOf": [inner, _PERCENT]} if name in _STEP_KEYS else inner
        for name, inner in schema["properties"].items()
    }
    if "steps" in properties:
        items = {"anyOf": [properties["steps"]["items"], _PERCENT]}
        properties["steps"] = {**properties["steps"], "items": items}
    return {**schema, "properties": properties, "description": schema.get("description", "").split("\n")[0]}
