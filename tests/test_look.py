"""`rarefy plot` and `rarefy report` on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

import tiny_run
from tiny_run import configuration, rarefy

PNG = b"\x89PNG"


@pytest.fixture
def params(tmp_path: Path) -> Path:
    percent = {"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 2, "stop": "75%"}}
    group = [{**percent, "param_filter": "body.weight"}, {"sparsity": 0.5, "param_filter": "middle.weight"}]
    return tiny_run.write(tmp_path, configuration(tmp_path, sparsity=group, loop={"num_steps": 20}))


def test_plot_draws_every_algorithm_beside_the_file_and_trains_nothing(params: Path) -> None:
    result = rarefy("plot", params)
    path = params.with_name("params_schedules.png")
    assert result.exit_code == 0 and path.read_bytes()[:4] == PNG
    assert result.stderr == f"3 charts in {path}\n" and not (params.parent / "out").exists()


def test_plot_builds_no_model(params: Path) -> None:
    (params.parent / "tiny.py").write_text("raise RuntimeError('imported')")
    assert rarefy("plot", params).exit_code == 0


def test_plot_takes_another_file_name_and_changes(params: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "a.png"
    assert (
        rarefy("plot", params, "-o", out, "--set", "trainer.init.sparsity=0.5").stderr
        == f"1 chart in {out}\n"
    )
    assert out.read_bytes()[:4] == PNG


def test_plot_counts_the_data_where_nothing_else_tells_the_length(params: Path) -> None:
    content = yaml.safe_load(params.read_text())
    content["trainer"]["init"]["loop"] = {"num_epochs": 2}
    params.write_text(yaml.safe_dump(content))
    assert rarefy("plot", params).exit_code == 0
    result = rarefy("plot", params, "--no-imports")
    assert result.exit_code == 2 and "tiny.py:make_batches" in result.stderr


def test_plot_of_several_trainers(tmp_path: Path) -> None:
    one, two = (configuration(tmp_path, sparsity=value, loop={"num_steps": 9}) for value in (0.5, 0.75))
    dense = configuration(tmp_path, loop={"num_steps": 9})
    dense["trainer"]["init"]["sparsity"] = None
    params = tiny_run.write(tmp_path, {"trainer": [one, two, dense]})
    assert rarefy("plot", params).stderr.startswith("2 charts in")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sparsity=null", "trainer.init.sparsity: a missing value is not allowed"),
        ("sparsity=90", "trainer.init.sparsity: 90 is not allowed"),
        ("loop.num_steps=null", "trainer.init.loop: a run without a length is not allowed"),
        ("lop=1", "trainer.init"),
    ],
)
def test_plot_of_a_file_with_a_mistake(params: Path, change: str, message: str) -> None:
    content = yaml.safe_load(params.read_text())
    del content["trainer"]["fit"]
    params.write_text(yaml.safe_dump(content))
    result = rarefy("plot", params, "--set", f"trainer.init.{change}")
    assert result.exit_code == 2 and message in result.stderr
    assert result.stderr.count("\n") == 1 and not list(params.parent.glob("*.png"))


def test_plot_without_a_file(tmp_path: Path) -> None:
    result = rarefy("plot", tmp_path / "gone.yaml")
    assert result.exit_code == 2 and "gone.yaml: cannot be read" in result.stderr


def test_plot_without_matplotlib(params: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = rarefy("plot", params)
    assert result.exit_code == 2
    assert result.stderr == "Error: PNG files need matplotlib; pip install 'rarefy[plot]'\n"


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "a_run"
    folder.mkdir()
    (folder / "metrics.csv").write_text("step,loss,eval/loss\n1,2.5,\n2,2.25,2.0\n")
    return folder


def test_report_goes_into_the_model_directory(model_dir: Path) -> None:
    result = rarefy("report", model_dir)
    text = (model_dir / "report.html").read_text()
    assert result.exit_code == 0 and result.stderr == f"report in {model_dir / 'report.html'}\n"
    assert "a_run: a sparse run" in text and "2.25" in text


def test_report_goes_elsewhere_and_leaves_pngs(model_dir: Path, tmp_path: Path) -> None:
    out, png = tmp_path / "new" / "a.html", tmp_path / "png"
    result = rarefy("report", model_dir, "-o", out, "--png", png)
    assert result.exit_code == 0 and out.exists() and not (model_dir / "report.html").exists()
    assert [path.name for path in png.iterdir()] == ["loss.png"]
    assert f"1 chart in {png}\n" in result.stderr


@pytest.mark.parametrize("name", ["gone", "empty"])
def test_report_of_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    result = rarefy("report", tmp_path / name)
    assert result.exit_code == 2 and result.stderr.count("\n") == 1
    assert (
        "give the model_dir of a run" in result.stderr and not (tmp_path / "empty" / "report.html").exists()
    )


def test_a_report_that_cannot_be_written(model_dir: Path) -> None:
    result = rarefy("report", model_dir, "-o", model_dir / "metrics.csv" / "a.html")
    assert result.exit_code == 2 and "a.html: cannot be written" in result.stderr
