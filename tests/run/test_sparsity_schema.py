"""The JSON schema of the sparsity block follows the algorithms and accepts what the examples hold."""

from __future__ import annotations

import re
from typing import Any

import pytest

from example_files import NAMES, load_example
from rarefy.config import accepted_options
from rarefy.methods.registry import ALGORITHMS
from rarefy.run.schema import json_schema
from rarefy.run.sparsity_schema import sparsity_schema

TYPES = {
    "number": (int, float),
    "integer": int,
    "string": str,
    "object": dict,
    "array": list,
    "null": type(None),
    "boolean": bool,
}


def fits(value: Any, schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    """The part of JSON schema that rarefy's schema uses."""
    if "$ref" in schema:
        schema = whole["$defs"][schema["$ref"].rpartition("/")[2]]
    if "anyOf" in schema and not any(fits(value, one, whole) for one in schema["anyOf"]):
        return False
    kinds = schema.get("type", list(TYPES))
    kinds = kinds if isinstance(kinds, list) else [kinds]
    if not any(isinstance(value, TYPES[kind]) for kind in kinds):
        return False
    if ("enum" in schema and value not in schema["enum"]) or ("const" in schema and value != schema["const"]):
        return False
    if isinstance(value, str) and not re.search(schema.get("pattern", ""), value):
        return False
    if isinstance(value, int | float) and not schema.get("minimum", value) <= value:
        return False
    if isinstance(value, list):
        if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
            return False
        return all(fits(one, schema.get("items", {}), whole) for one in value)
    return not isinstance(value, dict) or _fits_mapping(value, schema, whole)


def _fits_mapping(value: dict[str, Any], schema: dict[str, Any], whole: dict[str, Any]) -> bool:
    if any(key not in value for key in schema.get("required", [])):
        return False
    known, others = schema.get("properties", {}), schema.get("additionalProperties", {})
    if others is False and set(value) - set(known):
        return False
    others = others if isinstance(others, dict) else {}
    return all(fits(inner, known.get(key, others), whole) for key, inner in value.items())


@pytest.mark.parametrize("name", NAMES)
def test_every_example_fits(name: str) -> None:
    content = load_example(name)
    assert fits(content, json_schema(), json_schema())


@pytest.mark.parametrize(
    "block",
    [
        "much",
        -0.5,
        {"algorithm": "rigl", "sparsity": "0.9"},
        {"algorithm": "rigel", "sparsity": 0.9},
        {"sparsity": {"type": "cosine", "init": 0.3}},
        {"sparsity": {"type": "linear", "init": 0.3, "slope": 0.1, "half_period": 5}},
        {"sparsity": 0.9, "update": {"freq": 0}},
        {"sparsity": 0.9, "update": {"stop": "late"}},
        {"sparsity": 0.9, "balance_in_groups": 0},
        [{"sparsity": 0.9, "init_method": "best"}],
        {"sparsity": 0.5, "pattern": {"n": 2}},
        {"sparsity": 0.5, "pattern": {"block": [8]}},
        {"sparsity": 0.5, "pattern": {"n": 2, "m": 4, "block": [8, 8]}},
        {"sparsity": 0.5, "distribution": "erg"},
        {"sparsity": 0.9, "param_filter": {"*": {"seed": -1}}},
    ],
)
def test_mistakes_do_not_fit(block: Any) -> None:
    assert not fits(block, sparsity_schema(), {})


@pytest.mark.parametrize(
    "block",
    [
        0.9,
        None,
        {"algorithm": "./my.py:Mine", "sparsity": [0.1, 0.5], "own_option": 3},
        {"sparsity": {"type": "cosine", "init": 0.3, "half_period": "75%"}, "update": {"steps": [1, "50%"]}},
        {"groups": [{"sparsity": 0.5}]},
        {"sparsity": 0.5, "pattern": {"n": 2, "m": 4}},
        {"sparsity": 0.5, "pattern": {"block": [8, 8]}, "distribution": "erk"},
    ],
)
def test_what_fits(block: Any) -> None:
    assert fits(block, sparsity_schema(), {})


def test_every_option_of_every_algorithm_is_there() -> None:
    entry = sparsity_schema()["anyOf"][1]["properties"]
    assert set(entry) == {"algorithm"} | {
        name for kind in ALGORITHMS.values() for name in accepted_options(kind)
    }
    assert all(entry.values())
