"""The pages say what the files of results say, and the files say what was measured."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from document_blocks import DOCS, ROOT
from results_claims import CLAIMS, COMPARISONS, as_written, figures

RESULTS = ROOT / "benchmarks" / "quality" / "results"


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    sys.path.insert(0, str(DOCS / "scripts"))
    yield importlib.import_module("results_page")
    sys.path.remove(str(DOCS / "scripts"))


def test_the_pages_have_the_figures_of_the_files(page: Any) -> None:
    for path in page.PAGES:
        text = path.read_text()
        assert page.filled(text) == text, f"{path.name}: run python docs/scripts/results_page.py"


def test_a_changed_figure_is_noticed(page: Any) -> None:
    text = (DOCS / "results.md").read_text()
    mark = next(page.MARK.finditer(text))
    changed = text.replace(mark[0], f"{mark[1]}99.9 ± 0.0{mark[4]}")
    assert page.filled(changed) == text


@pytest.mark.parametrize("words", CLAIMS)
def test_figures_in_the_text_are_those_of_the_files(words: str) -> None:
    assert words in (DOCS / "results.md").read_text()
    written = figures(words)
    assert [as_written(*pair) for pair in zip(CLAIMS[words](), written, strict=True)] == written


@pytest.mark.parametrize("words", COMPARISONS)
def test_comparisons_in_the_text_hold_in_the_files(words: str) -> None:
    assert words in (DOCS / "results.md").read_text()
    assert COMPARISONS[words]()


@pytest.mark.parametrize(
    "path", ["README.md", "docs/index.md", "docs/choosing.md", "docs/compute.md", "docs/results.md"]
)
def test_figures_of_speed_stand_among_those_of_the_benchmarks(path: str) -> None:
    """Each row of them, as 2.6 / 3.2 / 3.8: what stands here alone nobody would measure again."""
    figure = r"\d+\.\d+(?:–\d+\.\d+)?"
    row = re.compile(rf"(?<![\d.]){figure}(?: / {figure})+(?!\d)")
    known = set(row.findall((ROOT / "benchmarks" / "README.md").read_text()))
    text = re.sub(r"<!-- results: .*?<!-- / -->", "", (ROOT / path).read_text(), flags=re.DOTALL)
    # A page may leave out the lowest sparsities of a row.
    unknown = [one for one in row.findall(text) if not any(f" / {it}".endswith(f" / {one}") for it in known)]
    assert unknown == []


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_a_file_of_results_is_the_average_of_its_runs(path: Path) -> None:
    tables = importlib.import_module("quality.__main__").TABLES
    table = importlib.import_module("quality.table")
    assert table.load(path.stem)["rows"] == tables[path.stem].rows(RESULTS)


def test_each_figure_has_five_runs() -> None:
    table = importlib.import_module("quality.table")
    for path in RESULTS.glob("*.json"):
        assert {row["runs"] for row in table.load(path.stem)["rows"]} == {5}, path.stem


def test_each_plot_of_the_page_is_there() -> None:
    text = (DOCS / "results.md").read_text()
    plots = {path.name for path in (DOCS / "pictures").glob("results_*.svg")}
    assert plots
    assert all(f"pictures/{name}" in text for name in plots)
