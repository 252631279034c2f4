"""A million points become a picture without losing their extremes; reading what loggers wrote."""

import csv
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard.writer import SummaryWriter

from rarefy.errors import RarefyError
from rarefy.report import logged_metrics
from rarefy.report.logged_metrics import read_metrics
from rarefy.report.scale import log_ticks, readable, scaled, ticks
from rarefy.report.series import MOST_POINTS, Series, joined

FLOATS = st.floats(-1e6, 1e6)


@given(values=st.lists(FLOATS, min_size=1, max_size=200), most=st.integers(1, 50))
def test_thinning_keeps_extremes_mean_and_ends(values: list[float], most: int) -> None:
    thin = Series.of(range(len(values)), values).thinned(most)
    assert len(thin) == min(most, len(values)) and thin.weight.sum() == len(values)
    assert thin.low.min() == min(values) and thin.high.max() == max(values)
    assert thin.steps[-1] == len(values) - 1 and (np.diff(thin.steps) > 0).all()
    assert np.average(thin.mean, weights=thin.weight) == pytest.approx(np.mean(values), abs=1e-6)
    assert thin.is_thinned == (len(values) > most)


def test_thinning_in_parts_weighs_every_value_alike() -> None:
    parts = [Series.of([1, 2, 3, 4], [1.0, 1.0, 1.0, 1.0]).thinned(1), Series.of([5], [6.0])]
    assert joined(parts).thinned(1).mean.tolist() == [2.0]


def test_values_that_are_not_finite_are_left_out() -> None:
    assert Series.of([1, 2, 3], [float("inf"), 1.0, float("nan")]).steps.tolist() == [2]


def write_csv(folder: Path, rows: int, every: int = 100) -> None:
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "eval/loss", "per_layer_grad_norm/w"])
        for step in range(1, rows + 1):
            loss = 50.0 if step == rows // 2 else 2.0
            writer.writerow([step, loss, 3.0 if step % every == 0 else "", 1.0])


def read(folder: Path) -> dict[str, Series]:
    return read_metrics(folder, lambda name: "norm" not in name)


def test_a_long_file_is_thinned_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logged_metrics, "ROWS_AT_ONCE", 500)
    write_csv(tmp_path, 40_000)
    held = logged_metrics.read_csv(tmp_path / "metrics.csv", lambda name: True)
    assert sum(map(len, held["loss"])) < 2 * logged_metrics.POINTS_IN_MEMORY
    found = read(tmp_path)
    assert set(found) == {"loss", "eval/loss"}
    loss = found["loss"]
    assert len(loss) == MOST_POINTS and loss.weight.sum() == 40_000 and loss.steps[-1] == 40_000
    assert loss.high.max() == 50 and loss.low.min() == 2 and found["eval/loss"].weight.sum() == 400


def test_a_short_file_is_read_as_it_is(tmp_path: Path) -> None:
    write_csv(tmp_path, 100, every=50)
    found = read(tmp_path)
    assert not found["loss"].is_thinned and found["eval/loss"].steps.tolist() == [50, 100]


def test_a_row_that_a_kill_cut_short_and_cells_that_are_no_numbers_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss,lr\n1,2.5,x\n2,1.5,0.1\n3,1.\nx,1,1\n")
    found = read(tmp_path)
    assert found["loss"].mean.tolist() == [2.5, 1.5] and found["lr"].steps.tolist() == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no column 'step'"), ("a,b\n1,2\n", "no column 'step'"), ("step,loss\n1,\0", "")],
)
def test_a_file_that_is_no_table_of_metrics(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    if message:
        with pytest.raises(RarefyError, match=message):
            read(tmp_path)
    else:
        assert read(tmp_path) == {}


def test_a_cell_larger_than_any_number(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_text("step,loss\n1," + "9" * 200_000 + "\n")
    with pytest.raises(RarefyError, match=r"metrics\.csv: cannot be read: field larger"):
        read(tmp_path)


def test_without_a_table_the_events_of_tensorboard_are_read(tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path / "events")) as writer:
        for step in range(1, 4):
            writer.add_scalar("loss", 4.0 - step, step)
            writer.add_scalar("some_norm", 1.0, step)
    found = read(tmp_path)
    assert list(found) == ["loss"] and found["loss"].mean.tolist() == [3.0, 2.0, 1.0]


def test_nothing_was_logged(tmp_path: Path) -> None:
    assert read(tmp_path) == {}


@given(low=FLOATS, width=st.floats(1e-3, 1e6), most=st.integers(2, 12))
def test_ticks_are_round_few_and_within(low: float, width: float, most: int) -> None:
    found = ticks(low, low + width, most)
    assert len(found) <= most + 1 and all(low - 1e-6 <= tick <= low + width + 1e-6 for tick in found)


def test_logarithmic_ticks_are_few() -> None:
    assert len(log_ticks(1e-12, 1e12)) <= 9 and log_ticks(3, 7) == []


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (-1234.0, "number", "-1,234"), (1234.5, "number", "1,234"), (0.05, "number", "0.05"),
        (1e-7, "number", "1e-07"), (123_456, "number", "123k"), (0.0, "percent", "0%"), (0.3333, "percent", "33.33%"),
        (3.0, "number", "3"), (-2.5e6, "number", "-2.5M"),
    ],
)  # fmt: skip
def test_numbers_as_people_read_them(value: float, unit: str, text: str) -> None:
    assert readable(value, unit) == text


def test_no_letter_is_beyond_the_largest() -> None:
    assert scaled(5e21) == "5e+06P" and scaled(0.5) == "0.5"
