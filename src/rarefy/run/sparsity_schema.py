"""The JSON schema of the `sparsity:` block, made from the options that the algorithms' constructors take."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from rarefy.algorithms.options import IMPORT_PATH, OptionField, options_of
from rarefy.methods.registry import ALGORITHMS

Json = dict[str, Any]

_FILTER = "param_filter"


def sparsity_schema() -> Json:
    """What may stand at `sparsity:`.

    Example:
        >>> [form["type"] for form in sparsity_schema()["anyOf"]]
        ['number', 'object', 'array', 'object', 'null']
    """
    entry = _entry()
    several = {"type": "array", "items": entry, "minItems": 1}
    groups = {"type": "object", "properties": {"groups": several}, "required": ["groups"]}
    number = {"type": "number", "minimum": 0, "exclusiveMaximum": 1}
    return {"anyOf": [number, entry, several, groups, {"type": "null"}]}


def _entry() -> Json:
    """One algorithm; its filter may also be a mapping from globs to options that differ there."""
    options = _options()
    globs = options.pop(_FILTER)
    overlay = {"type": ["object", "null"], "properties": options, "additionalProperties": True}
    overlays = {"type": "object", "additionalProperties": overlay}
    param_filter = {**globs, "anyOf": [*globs["anyOf"], overlays]}
    # Classes of the user's own may take options that nobody here knows.
    return {
        "type": "object",
        "properties": {**options, _FILTER: param_filter},
        "additionalProperties": True,
    }


def _options() -> Json:
    """The options of all registered algorithms."""
    known: dict[str, list[OptionField]] = {}
    for kind in ALGORITHMS.values():
        for name, option in options_of(kind).items():
            known.setdefault(name, []).append(option)
    algorithm = {"anyOf": [{"enum": list(ALGORITHMS)}, IMPORT_PATH]}
    return {"algorithm": algorithm, **{name: _described(known[name]) for name in sorted(known)}}


def _described(takers: Sequence[OptionField]) -> Json:
    """One option, in the words of the first algorithm that takes it; its default where all agree on one."""
    option = takers[0]
    schema: Json = {} if option.type is None else option.type.schema()
    schema = {"description": option.description, **schema}
    is_agreed = all(other.default == option.default for other in takers)
    is_shown = is_agreed and option.default is not inspect.Parameter.empty and option.default is not None
    return {**schema, "default": option.default} if is_shown else schema
