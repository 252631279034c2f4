"""What a report says of a run, and what it says is missing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rarefy.errors import RarefyError
from rarefy.report.cost_chart import dense_flops, flops_over_time, sparse_flops, training_share
from rarefy.report.heat import MOST_COLUMNS, topology_map
from rarefy.report.run_data import MaskFacts, Run, read_run
from rarefy.report.scale import scaled
from rarefy.report.sections import headlines, last_step, sections_of
from rarefy.report.series import Series


def section(run: Run, key: str):
    return next(one for one in sections_of(run) if one.key == key)


def keys(run: Run) -> list[str]:
    return [chart.key for one in sections_of(run) for chart in one.charts]


def test_a_run_with_everything_turned_on_misses_nothing(logged: Run) -> None:
    charts = ["loss", "lr", "grad-norm", "sparsity", "topology", "explored", "balance", "flops"]
    assert keys(logged) == [*charts, "training-flops", "throughput"]
    assert [text for one in sections_of(logged) for text in one.missing] == []


def test_a_run_as_it_comes_says_what_to_turn_on(plain: Run) -> None:
    assert keys(plain) == ["loss", "lr", "grad-norm", "sparsity", "balance", "throughput"]
    assert "add `LogSparsity: {}` to callbacks" in section(plain, "topology").missing[0]
    assert "add `LogSparsity: {}` to callbacks" in section(plain, "cost").missing[0]
    assert section(plain, "sparsity").missing == []


def test_the_figures_that_matter_most(logged: Run) -> None:
    found = dict(headlines(logged))
    assert found["step"] == "6 of 6" and found["sparsity"] == "75%"
    assert {"training loss", "validation loss", "FLOPs against dense", "samples per second"} <= found.keys()


def test_operations_leave_out_what_is_inactive(logged: Run) -> None:
    dense = 2 * 4 * (8 * 16 + 16 * 16 + 16)
    assert dense_flops(logged) == dense
    assert sparse_flops(logged) == pytest.approx(dense - 0.75 * 2 * 4 * (8 * 16 + 16 * 16))
    over_time = flops_over_time(logged)
    assert over_time is not None and over_time.last == pytest.approx(sparse_flops(logged) / dense)


def test_training_so_far_counts_dense_gradients_and_updates(logged: Run) -> None:
    weights, rest = 8 * 16 + 16 * 16, 16
    dense = 6 * 3 * 2 * 4 * (weights + rest)
    # Steps 3 and 6 are updates: their dense gradients are whole, and each position is ranked.
    sparse = 6 * 3 * 2 * 4 * (weights // 4 + rest) + 2 * (2 * 4 * 3 * weights // 4 + 2 * weights)
    assert logged.metrics["flops/dense"].last == dense and logged.metrics["flops/sparse"].last == sparse
    share = training_share(logged)
    assert share is not None and share.last == pytest.approx(sparse / dense)
    rows = {row[0]: row for row in section(logged, "cost").tables[1].rows}
    assert rows["training so far"][1:3] == (scaled(dense, "FLOP"), scaled(sparse, "FLOP"))
    assert {"weights, masks and indices", "gradients", "optimizer states"} <= rows.keys()


def test_without_the_callback_the_training_so_far_is_not_known(plain: Run) -> None:
    assert training_share(plain) is None and len(section(plain, "cost").tables) == 1


def test_topology_has_a_column_for_each_update(logged: Run) -> None:
    chart = topology_map(logged)
    assert (
        chart is not None and chart.columns == ["3", "6"] and chart.rows == ["body.weight", "middle.weight"]
    )
    assert (chart.values > 0).all() and chart.high <= 0.3


def test_many_updates_share_columns() -> None:
    grown = Series.of(range(1, 1001), np.linspace(0, 1, 1000))
    few = Series.of([1000], [0.5])
    chart = topology_map(Run(Path(), {"sparsity/a.w/grown": grown, "sparsity/a.v/grown": few}))
    assert chart is not None and chart.values.shape == (2, MOST_COLUMNS) and chart.rows == ["w", "v"]
    assert np.diff(chart.values[0]).min() > 0 and np.nanmean(chart.values[0]) == pytest.approx(0.5, abs=0.01)
    assert np.isnan(chart.values[1, :-1]).all() and chart.values[1, -1] == 0.5
    assert "about 10 updates" in chart.subtitle


def test_groups_are_counted_from_the_masks(logged: Run) -> None:
    [chart] = section(logged, "balance").charts
    assert chart.values.shape == (2, 4) and (chart.values == 0.25).all()
    assert "2 parameters have balanced groups" in section(logged, "balance").text[0]


def test_uneven_groups_are_named(logged: Run) -> None:
    odd = MaskFacts("w", (2, 2), 1, (0.5, 0.0))
    assert section(replace(logged, masks=(odd,)), "balance").text == ["1 of 1 parameters are uneven: w"]


def test_every_parameter_is_listed(logged: Run) -> None:
    [table] = section(logged, "parameters").tables
    assert ("middle.weight", "16 × 16", "rigl", "75%", "64", "256") in table.rows


def test_the_run_itself(logged: Run) -> None:
    facts = section(logged, "facts")
    rows = dict(facts.tables[0].rows)
    assert rows["last step"] == "6" and rows["session 1"].startswith("from step 0 to 6 · 20")
    assert "torch" in rows[""] and "balance_out_groups: 4" in facts.source


def test_a_dense_run(tmp_path: Path) -> None:
    record = {"format": 1, "sparse": {}, "sessions": [], "total_steps": 3}
    (tmp_path / "run.json").write_text(json.dumps(record))
    run = read_run(tmp_path, pytest.fail)
    assert run.is_dense
    for key in ("sparsity", "topology", "balance", "parameters"):
        assert "The run is dense" in section(run, key).text[0]


def test_metrics_alone(logged_dir: Path, tmp_path: Path) -> None:
    shutil.copy(logged_dir / "metrics.csv", tmp_path)
    run = read_run(tmp_path, pytest.fail)
    assert not run.is_dense and run.step is None and last_step(run) == 6
    assert "no checkpoint yet" in section(run, "parameters").missing[0]
    assert "no checkpoint yet" in section(run, "balance").missing[0]
    assert "RunRecord" in section(run, "cost").missing[0] and "RunRecord" in section(run, "facts").missing[0]
    assert "topology" in keys(run)


def test_a_checkpoint_alone(logged_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(logged_dir / "checkpoint_6", tmp_path / "checkpoint_6")
    run = read_run(tmp_path, pytest.fail)
    assert run.step == 6 and [mask.sparsity for mask in run.masks] == [0.75, 0.75]
    for key in ("loss", "throughput"):
        assert "CSVLogger" in section(run, key).missing[0]
    assert (
        "RunRecord" in section(run, "sparsity").missing[0]
        and "RunRecord" in section(run, "balance").missing[0]
    )


def test_a_damaged_checkpoint_is_passed_over(logged_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(logged_dir, tmp_path / "run")
    (tmp_path / "run" / "checkpoint_6" / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    run = read_run(tmp_path / "run", warnings.append)
    assert run.step is None and "skipping checkpoint_6" in warnings[0]


def test_no_updates_and_no_groups_and_no_validation(plain: Run) -> None:
    metrics = {"loss": plain.metrics["loss"], "sparsity/w/actual": Series.of([1], [0.5])}
    run = replace(plain, metrics=metrics, masks=(MaskFacts("w", (2, 2), 2),))
    assert "No topology was updated" in section(run, "topology").missing[0]
    assert "balance_out_groups" in section(run, "balance").missing[0]
    assert "No validation" in section(run, "loss").missing[0]


@pytest.mark.parametrize(
    ("name", "message"), [("gone", "does not exist"), ("file", "is a file"), ("empty", "holds no")]
)
def test_no_model_directory(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(RarefyError, match=f"{name}.*{message}.*; give the model_dir of a run"):
        read_run(tmp_path / name, pytest.fail)


def test_several_processes_side_by_side(plain: Run) -> None:
    assert "ranks" not in {one.key for one in sections_of(plain)}
    rate = {"samples_per_second": Series.of([1, 2], [10, 30])}
    shared = rate | {"communication/share": Series.of([1, 2], [0.1, 0.3])}
    found = section(replace(plain, ranks={0: shared, 1: rate, 2: {}}), "ranks")
    assert found.tables[0].rows == [("0", "20", "20%", "–"), ("1", "20", "–", "–"), ("2", "–", "–", "–")]
    assert [line.label for chart in found.charts for line in chart.lines] == ["rank 0", "rank 1"]
