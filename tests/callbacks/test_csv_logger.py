"""metrics.csv: a row a step, columns that may grow, no step twice."""

import csv

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.callbacks import CSVLogger
from rarefy.callbacks.loggers.csv_logger import MetricsTable
from rarefy.errors import RarefyError

NAMES = st.sampled_from(["loss", "lr", "eval/loss", 'odd, "name"\n', "sparsity/*/target"])


def table(trainer) -> list[dict[str, str]]:
    with (trainer.model_dir / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def started(trainer, step: int = 0) -> CSVLogger:
    trainer.global_step = step
    logger = CSVLogger()
    logger.on_fit_start(trainer)
    return logger


def test_metrics_of_a_step_share_a_row(make_trainer):
    trainer = make_trainer()
    logger = started(trainer)
    for step in (1, 2):
        logger.log(trainer, {"loss": 1.0 / step}, step)
        logger.log(trainer, {"lr": 0.1}, step)
    assert table(trainer) == [
        {"step": "1", "loss": "1.0", "lr": "0.1"},
        {"step": "2", "loss": "0.5", "lr": "0.1"},
    ]


def test_columns_grow_and_old_rows_stay(make_trainer):
    trainer = make_trainer()
    logger = started(trainer)
    logger.log(trainer, {"loss": 3.0}, 1)
    logger.log(trainer, {"loss": 2.0, "eval/loss": 2.5}, 2)
    logger.log(trainer, {"loss": 1.0}, 3)
    assert table(trainer) == [
        {"step": "1", "loss": "3.0", "eval/loss": ""},
        {"step": "2", "loss": "2.0", "eval/loss": "2.5"},
        {"step": "3", "loss": "1.0", "eval/loss": ""},
    ]


def test_numbers_are_exact(make_trainer):
    trainer = make_trainer()
    values = {"a": 0.1 + 0.2, "b": 1e-300, "c": float("inf"), "d": 7}
    started(trainer).log(trainer, values, 1)
    assert {name: float(cell) for name, cell in table(trainer)[0].items() if name != "step"} == values


@pytest.mark.parametrize("resume_step", [0, 2, 5, 9])
def test_a_resumed_run_has_every_step_once(make_trainer, resume_step):
    trainer = make_trainer()
    logger = started(trainer)
    for step in range(1, 6):
        logger.log(trainer, {"loss": 1.0}, step)
    logger = started(trainer, resume_step)
    for step in range(resume_step + 1, 11):
        logger.log(trainer, {"loss": 2.0}, step)
    kept = min(resume_step, 5)
    steps = [*range(1, kept + 1), *range(resume_step + 1, 11)]
    assert [int(row["step"]) for row in table(trainer)] == steps
    assert [float(row["loss"]) for row in table(trainer)] == [1.0] * kept + [2.0] * (len(steps) - kept)


def test_a_line_cut_short_by_a_kill_is_dropped(make_trainer):
    trainer = make_trainer()
    started(trainer).log(trainer, {"loss": 1.0}, 1)
    with (trainer.model_dir / "metrics.csv").open("a") as file:
        file.write("2,0.1234")
    started(trainer, 3).log(trainer, {"loss": 3.0}, 4)
    assert [row["step"] for row in table(trainer)] == ["1", "4"]


def test_another_file_of_that_name_does_not_disturb(make_trainer):
    trainer = make_trainer()
    (trainer.model_dir / "metrics.csv").write_bytes(b"\xff\x00 no table\nx\n")
    started(trainer).log(trainer, {"loss": 1.0}, 1)
    assert table(trainer) == [{"step": "1", "loss": "1.0"}]


def test_a_file_deleted_meanwhile_is_made_again(make_trainer):
    trainer = make_trainer()
    logger = started(trainer)
    logger.log(trainer, {"loss": 1.0}, 1)
    (trainer.model_dir / "metrics.csv").unlink()
    logger.log(trainer, {"loss": 2.0}, 2)
    assert table(trainer) == [{"step": "2", "loss": "2.0"}]


def test_validating_an_earlier_checkpoint_adds_to_its_row(make_trainer):
    trainer = make_trainer()
    logger = started(trainer)
    for step in (1, 2, 3):
        logger.log(trainer, {"loss": 1.0}, step)
    CSVLogger().log(trainer, {"eval/loss": 5.0}, 2)
    assert [(row["step"], row["eval/loss"]) for row in table(trainer)] == [("1", ""), ("2", "5.0"), ("3", "")]


def test_the_directory_is_made_and_nothing_is_written_before_the_first_metric(make_trainer, tmp_path):
    trainer = make_trainer(model_dir=tmp_path / "new")
    logger = started(trainer)
    assert not (tmp_path / "new").exists()
    logger.log(trainer, {"loss": 1.0}, 1)
    assert len(table(trainer)) == 1


def test_a_file_that_cannot_be_written_is_one_clear_line(make_trainer, tmp_path):
    (tmp_path / "file").write_text("in the way")
    trainer = make_trainer(model_dir=tmp_path / "file")
    with pytest.raises(RarefyError, match=r"metrics\.csv: cannot be written: .*; free space or fix"):
        CSVLogger().log(trainer, {"loss": 1.0}, 1)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.dictionaries(NAMES, st.floats(allow_nan=False)))))
def test_any_order_of_steps_and_names(tmp_path_factory, entries):
    path = tmp_path_factory.mktemp("table") / "metrics.csv"
    expected: dict[int, dict[str, float]] = {}
    metrics = MetricsTable(path)
    for index, (step, values) in enumerate(entries):
        metrics = MetricsTable(path) if index % 3 == 2 else metrics
        metrics.add(step, {name: str(value) for name, value in values.items()})
        expected[step] = {**expected.get(step, {}), **values}
    if not entries:
        return
    with path.open(newline="") as file:
        rows = [{name: cell for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    found = {int(row.pop("step")): {name: float(cell) for name, cell in row.items()} for row in rows}
    assert found == expected and list(found) == sorted(found)
