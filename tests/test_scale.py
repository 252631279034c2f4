"""docs/scale.md shows what its script computes, and the formulas agree with small runs."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scale(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("scale")


def test_the_page_shows_what_is_computed(scale: Any) -> None:
    page = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    assert "\n".join(scale.table()) in page
    assert f"{scale.INDEX_BYTES} d S" in page


@pytest.mark.slow
def test_formulas_agree_with_two_processes(scale: Any) -> None:
    for name, found, expected in scale.checked():
        # A checkpoint has some kilobytes of text as well.
        assert found == pytest.approx(expected, rel=0.02), name
