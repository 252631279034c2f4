"""The page of every key is what the generator makes, and leaves no key and no public name out."""

from __future__ import annotations

import importlib.util
import re
from types import ModuleType
from typing import Any

import pytest
from pydantic import BaseModel

import rarefy.callbacks
import rarefy.data
import rarefy.export
import rarefy.models
from document_blocks import DOCS, PAGES, references
from rarefy.callbacks.registry import REGISTRY
from rarefy.data.registry import DATA_PROCESSORS
from rarefy.optim.optimizers import optimizer_classes
from rarefy.optim.schedulers import SCHEDULES, TORCH_SCHEDULERS
from rarefy.run.schema import json_schema

PAGE = DOCS / "keys.md"
ALIASES = {"FORMATS", "MODELS", "DATA_PROCESSORS"}


def generator() -> ModuleType:
    path = DOCS / "scripts" / "key_reference.py"
    spec = importlib.util.spec_from_file_location("key_reference", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def without_optimizers(text: str) -> list[str]:
    """The page without the section that depends on the version of torch."""
    return re.sub(r"## `optimizer`.*?(?=\n## )", "", text, flags=re.DOTALL).splitlines()


def test_the_page_is_what_the_generator_makes() -> None:
    made = generator().key_reference()
    assert without_optimizers(PAGE.read_text()) == without_optimizers(made), (
        "run python docs/scripts/key_reference.py"
    )
    assert all(f"| `{name}` |" in made for name in optimizer_classes())


def keys_in(schema: Any) -> set[str]:
    """Every property that a schema names; those of the `sparsity:` block have a page of their own."""
    if isinstance(schema, list):
        return {key for part in schema for key in keys_in(part)}
    if not isinstance(schema, dict):
        return set()
    own = set(schema.get("properties", {}))
    return own.union(*(keys_in(value) for key, value in schema.items() if key != "sparsity"))


def test_it_has_every_key_of_the_schema_and_every_name() -> None:
    text = PAGE.read_text()
    schemas = [json_schema(), *(one.config_class.model_json_schema() for one in DATA_PROCESSORS.values())]
    keys = {key for schema in schemas for key in keys_in({**schema, "$defs": own_blocks(schema)})}
    assert len(keys) > 60
    assert [
        key for key in sorted(keys - {"trainer", "name", "data_processor"}) if f"`{key}`" not in text
    ] == []
    names = [*DATA_PROCESSORS, *SCHEDULES, *TORCH_SCHEDULERS, *REGISTRY["callbacks"], *REGISTRY["loggers"]]
    assert [name for name in names if f"`{name}`" not in text] == []


def own_blocks(schema: dict[str, Any]) -> dict[str, Any]:
    return {name: block for name, block in schema.get("$defs", {}).items() if name != "AddSinkTokens"}


def test_every_key_has_a_type_a_meaning_and_an_example() -> None:
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    five = [cells for cells in (re.split(r"(?<!\\)\|", row)[1:-1] for row in rows) if len(cells) == 5]
    assert len(five) > 80
    assert [cells[0] for cells in five if not all(cell.strip() for cell in cells)] == []


PUBLIC = {
    "rarefy.callbacks": rarefy.callbacks.__all__,
    "rarefy.data": rarefy.data.__all__,
    "rarefy.export": rarefy.export.__all__,
    "rarefy.models": rarefy.models.__all__,
    "rarefy.algorithms.summary": ["Summary", "SummaryRow"],
    "rarefy.integrations.transformers": ["SparsityCallback"],
    "rarefy.integrations.lightning": ["SparsityCallback"],
    "rarefy.integrations.accelerate": ["sparsify"],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_every_public_name_has_its_place_in_the_reference(module: str) -> None:
    shown = {name for page in PAGES if page.parent.name == "api" for name in references(page)}
    missing = {f"{module}.{name}" for name in PUBLIC[module] if name not in ALIASES} - shown
    assert missing - {"rarefy.callbacks.Callback", "rarefy.callbacks.Logger"} == set()
    assert "rarefy.callbacks.events" in shown


def test_a_key_without_words_would_be_seen() -> None:
    class Nameless(BaseModel):
        key: int = 1

    assert generator().table(Nameless).splitlines()[-1] == "| `key` |  | `1` |  | `key: 1` |"
