"""`rarefy compare`: several runs in a table and on one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import tiny_run
from tiny_run import configuration, rarefy


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    params = tiny_run.write(folder, configuration(folder, sparsity=0.5, logging={"log_steps": 2}))
    for name, sparsity in (("low", "0.5"), ("high", "0.75"), ("dense", "null")):
        result = rarefy(
            "run", params, "-o", folder / "sweep" / name, "--set", f"trainer.init.sparsity={sparsity}"
        )
        assert result.exit_code == 0, result.output
    return folder / "sweep"


def test_a_line_a_run_and_a_page(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "page.html"
    result = rarefy("compare", sweep / "low", sweep / "high", sweep / "dense", "--out", out)
    assert result.exit_code == 0 and f"comparison in {out}" in result.stderr
    lines = [re.split(r" {2,}", line.strip()) for line in result.stdout.splitlines() if "samples/s" in line]
    assert [(line[0], line[1], line[4]) for line in lines] == [
        ("low", "6", "50%"),
        ("high", "6", "75%"),
        ("dense", "6", "dense"),
    ]
    assert lines[0][-1] == "1.00 ×"
    page = out.read_text()
    assert all(
        title in page
        for title in ("Training loss", "Validation loss", "Actual sparsity", "Samples per second")
    )
    assert page.count("<figure") == 4


def test_a_page_takes_the_place_of_a_page_only(sweep: Path, tmp_path: Path) -> None:
    out = tmp_path / "page.html"
    for _ in range(2):
        assert rarefy("compare", sweep / "low", sweep / "high", "--out", out).exit_code == 0
    out.write_text("trainer: {}")
    result = rarefy("compare", sweep / "low", sweep / "high", "--out", out)
    assert result.exit_code == 2 and "page.html: is there already, and no page of rarefy's" in result.stderr
    assert out.read_text() == "trainer: {}"


def test_a_folder_stands_for_the_runs_in_it(sweep: Path, tmp_path: Path) -> None:
    result = rarefy("compare", sweep, sweep / "low", "-o", tmp_path / "page.html")
    assert result.exit_code == 0 and result.stdout.count("samples/s") == 3


def test_runs_of_one_name_are_told_apart(sweep: Path, tmp_path: Path) -> None:
    real = tmp_path / "again" / "low"
    real.mkdir(parents=True)
    (real / "metrics.csv").write_text("step,loss\n1,2.5\n")
    result = rarefy("compare", sweep / "low", real, "-o", tmp_path / "page.html")
    assert "sweep/low" in result.stdout and "again/low" in result.stdout


def test_one_run_is_no_comparison(sweep: Path, tmp_path: Path) -> None:
    for given, said in (([sweep / "low"], "1 run"), ([sweep / "low", sweep / "low"], "1 run")):
        result = rarefy("compare", *given)
        assert result.exit_code == 2 and f"RUN: {said} is not allowed" in result.stderr
    result = rarefy("compare", sweep / "low", tmp_path / "none")
    assert result.exit_code == 2 and "none does not exist" in result.stderr
    (tmp_path / "file").write_text("")
    result = rarefy("compare", sweep, "-o", tmp_path / "file" / "page.html")
    assert result.exit_code == 2 and "cannot be written" in result.stderr


def test_runs_that_share_no_metric(tmp_path: Path) -> None:
    for name, metric in (("a", "loss"), ("b", "lr")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text(f"step,{metric}\n1,2.5\n")
    result = rarefy("compare", tmp_path, "-o", tmp_path / "page.html")
    assert result.exit_code == 0 and "No metric was logged by two" in (tmp_path / "page.html").read_text()
