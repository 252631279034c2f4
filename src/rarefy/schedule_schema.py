"""JSON schemas of schedules and of update schedules, made from the classes themselves."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter

from rarefy.schedules import SCHEDULES, AtSteps, EveryNSteps
from rarefy.validation import StepMark, marked_fields

Json = dict[str, Any]

_NUMBER: Json = {"type": "number"}
# What `rarefy.config` takes for a percentage.
_PERCENT: Json = {"type": "string", "pattern": r"^\s*\d+(\.\d+)?\s*%\s*$", "description": "a part of the run"}


def schedule_schema() -> Json:
    """What may be written for a schedule: a number, a list, or a mapping with `type`.

    Example:
        >>> [form["type"] for form in schedule_schema()["anyOf"]][:3]
        ['number', 'array', 'object']
    """
    forms = [_typed(name, kind) for name, kind in SCHEDULES.items()]
    return {"anyOf": [_NUMBER, {"type": "array", "items": _NUMBER, "minItems": 1}, *forms]}


def update_schema() -> Json:
    """What may be written for an update schedule.

    Example:
        >>> sorted(update_schema()["anyOf"][0]["properties"])
        ['freq', 'start', 'stop']
    """
    return {"anyOf": [*(_with_percent(kind) for kind in (EveryNSteps, AtSteps)), {"type": "null"}]}


def _typed(name: str, kind: type) -> Json:
    schema = _with_percent(kind)
    properties = {"type": {"const": name}, **schema["properties"]}
    return {**schema, "properties": properties, "required": ["type", *schema.get("required", [])]}


def _with_percent(kind: type) -> Json:
    """A dataclass's schema whose steps may also be percentages, without the docstring's examples."""
    schema = TypeAdapter(kind).json_schema()
    steps = marked_fields(kind, StepMark)
    properties = {
        name: _or_percent(inner) if name in steps else inner for name, inner in schema["properties"].items()
    }
    return {**schema, "properties": properties, "description": schema.get("description", "").split("\n")[0]}


def _or_percent(inner: Json) -> Json:
    if "items" in inner:
        return {**inner, "items": {"anyOf": [inner["items"], _PERCENT]}}
    return {"anyOf": [inner, _PERCENT]}
