"""Every notebook runs from top to bottom, and opens in Colab."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import pytest

from document_blocks import ROOT

NOTEBOOKS = sorted((ROOT / "examples" / "notebooks").glob("*.ipynb"))


def cells(path: Path, kind: str) -> list[str]:
    return [
        "".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind
    ]


@pytest.fixture(scope="module", params=NOTEBOOKS, ids=lambda path: path.stem)
def executed(request: pytest.FixtureRequest) -> tuple[Path, dict[str, Any], str]:
    """A notebook, its names after the last cell, and what it printed; cells for IPython alone are left out."""
    printed = io.StringIO()
    names: dict[str, Any] = {"__name__": "__main__"}
    with contextlib.redirect_stdout(printed):
        for number, code in enumerate(cells(request.param, "code")):
            if not code.startswith("%"):
                exec(compile(code, f"{request.param.name}, cell {number}", "exec"), names)
    return request.param, names, printed.getvalue()


def test_there_are_three() -> None:
    assert len(NOTEBOOKS) == 3


def test_it_runs(executed: tuple[Path, dict[str, Any], str]) -> None:
    assert executed[2]


def test_it_shows_what_its_words_say(executed: tuple[Path, dict[str, Any], str]) -> None:
    path, names, printed = executed
    if path.stem == "first_sparse_run":
        assert names["losses"]["rigl"] < names["losses"]["static"]
        assert 0.85 < names["zeros"] < 0.95
    elif path.stem == "own_method":
        assert "soft_rigl" in printed
        assert set(names["losses"]) == {"SET", "RigL", "SoftRigL"}
    else:
        values = [float(line.split(":")[1].split()[0]) for line in printed.splitlines() if ":  " in line]
        at_once, tuned = values
        assert tuned < at_once


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_link_to_colab_is_its_own(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    assert (
        f"https://colab.research.google.com/github/rarefy/rarefy/blob/main/{name}"
        in cells(path, "markdown")[0]
    )


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_it_is_kept_without_outputs(path: Path) -> None:
    found = json.loads(path.read_text())["cells"]
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in found)
