"""From what a user writes at `init_method` to what makes the first masks."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter

from rarefy.distributions import GLOBAL
from rarefy.errors import ConfigError, did_you_mean
from rarefy.first_masks.from_data import FromData
from rarefy.initializers import INITIALIZERS, Initializer, parse_initializer
from rarefy.patterns.structures import NOfM, Structure
from rarefy.schedule_schema import Json
from rarefy.validation import build, shorten

_CHANGES_WEIGHTS = "sparsegpt"


@cache
def kinds() -> Mapping[str, Any]:
    """The classes of the methods that have keys, by name.

    Example:
        >>> list(kinds())
        ['snip', 'grasp', 'synflow', 'wanda', 'magnitude_mixed', 'topk_of']
    """
    # Imported once one is named: most runs draw their first masks, and need none of what measures them.
    from rarefy.first_masks.from_file import TopKOf
    from rarefy.first_masks.kinds import Grasp, MagnitudeMixed, Snip, SynFlow, Wanda

    return MappingProxyType({one.name: one for one in (Snip, Grasp, SynFlow, Wanda, MagnitudeMixed, TopKOf)})


def parse_first_masks(value: Any) -> Initializer | FromData:
    """What makes the first masks.

    Args:
        value: a name, a function, a mapping with `name` and the keys of that method, or a method as an object.

    Raises:
        ConfigError: an unknown name or key, or a value that is not allowed.

    Example:
        >>> parse_first_masks({"name": "snip", "batches": 4}).name
        'snip'
    """
    if isinstance(value, FromData):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(value)
    if callable(value) or (isinstance(value, str) and value.lower() in INITIALIZERS):
        return parse_initializer(value)
    if isinstance(value, str) and value.lower() in kinds():
        return _from_mapping({"name": value})
    raise _unknown("init_method", value)


def _from_mapping(value: Mapping[str, Any]) -> Initializer | FromData:
    options = {key: one for key, one in value.items() if key != "name"}
    name = value.get("name")
    if isinstance(name, str) and name.lower() in INITIALIZERS:
        if options:
            raise ConfigError(
                "init_method", f"the key {next(iter(options))!r} with {name}", f"the name alone: {name}"
            )
        return INITIALIZERS[name.lower()]
    if not isinstance(name, str) or name.lower() not in kinds():
        raise _unknown("init_method.name", name)
    return build(kinds()[name.lower()], options, path="init_method")


def _unknown(path: str, value: Any) -> ConfigError:
    if str(value).lower() == _CHANGES_WEIGHTS:
        allowed = (
            "a method that makes masks alone; sparsegpt changes the weights as well: run `rarefy prune --method "
            "sparsegpt` first (in Python rarefy.prune), and train from its result with init_method: from_zeros"
        )
        return ConfigError(path, value, allowed, "init_method: from_zeros")
    hint = did_you_mean(str(value), (*INITIALIZERS, *kinds()))
    given = "a missing value" if value is None else shorten(value)
    return ConfigError(path, given, f"a known method ({hint})", "init_method: topk")


def competes_by_weight(
    method: Initializer | FromData, *, dynamic: bool, distribution: str, structure: Structure
) -> bool:
    """Whether each weight keeps its own target at the start, where a method would let all of them compete.

    Args:
        method: what makes the first masks.
        dynamic: whether updates follow, which hold each weight at its target.
        distribution: how the sparsity is shared out.
        structure: inside a piece.

    Raises:
        ConfigError: `scope: global` is asked for where this is so.

    Example:
        >>> from rarefy.patterns.structures import FREE
        >>> snip = parse_first_masks({"name": "snip", "batches": 1})
        >>> competes_by_weight(snip, dynamic=True, distribution="uniform", structure=FREE)
        True
    """
    if distribution == GLOBAL:
        # Updates let the connections of all weights compete as well.
        return False
    reasons = {
        f"distribution {distribution}, which says how many connections each weight has": distribution
        != "uniform",
        "updates, which hold each weight at its own target": dynamic,
        f"the pattern {structure}, of which every weight keeps n of m": isinstance(structure, NOfM),
    }
    reason = next((words for words, holds in reasons.items() if holds), None)
    if reason is not None and getattr(method, "scope", None) == "global":
        raise ConfigError("init_method.scope", f"global beside {reason},", "layer", "scope: layer")
    return reason is not None


def first_masks_schema() -> Json:
    """What may be written at `init_method` beside an import path.

    Example:
        >>> [form["properties"]["name"]["const"] for form in first_masks_schema()["anyOf"][1:]][:2]
        ['snip', 'grasp']
    """
    # Of the methods with keys those that can do without any.
    names: Json = {"enum": [*INITIALIZERS, "magnitude_mixed", "synflow"]}
    return {"anyOf": [names, *(_form(name, kind) for name, kind in kinds().items())]}


def _form(name: str, kind: Any) -> Json:
    schema = TypeAdapter(kind).json_schema()
    properties = {"name": {"const": name}, **schema["properties"]}
    # A function has no place in a file, and there batches are a number.
    properties.pop("loss", None)
    if "batches" in properties:
        properties["batches"] = {"type": "integer", "minimum": 1, **properties["batches"]}
    description = schema.get("description", "").split("\n")[0]
    required = ["name", *schema.get("required", [])]
    return {**schema, "properties": properties, "required": required, "description": description}
