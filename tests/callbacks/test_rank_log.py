"""Files of each of several processes: what it said, how fast it was, how its fit ended."""

import csv
import logging
from pathlib import Path

import pytest

from rarefy.callbacks.rank_log import RankLog, table_of
from rarefy.errors import RarefyError


@pytest.fixture(autouse=True)
def second_of_two(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def end_step(log, trainer, **metrics: float) -> None:
    trainer.global_step += 1
    trainer.is_log_step = True
    log.on_train_batch_end(trainer, metrics)


def rows_of(folder: Path) -> list[dict[str, str]]:
    with table_of(folder, 1).open(newline="") as file:
        return list(csv.DictReader(file))


def said(folder: Path) -> str:
    return (folder / "ranks" / "rank_1.log").read_text()


def test_what_was_said_and_how_fast_it_was(make_trainer):
    trainer = make_trainer()
    log = RankLog()
    log.on_fit_start(trainer)
    logging.getLogger("rarefy").warning("step 3 was skipped: %s", "loss")
    end_step(log, trainer, loss=2.0, tokens_per_second=600.0, **{"communication/share": 0.25})
    trainer.is_log_step = False
    log.on_train_batch_end(trainer, {"loss": 1.0})
    log.on_fit_end(trainer)
    logging.getLogger("rarefy").warning("afterwards")
    assert rows_of(trainer.model_dir) == [
        {"step": "1", "tokens_per_second": "300.0", "communication/share": "0.25"}
    ]
    lines = said(trainer.model_dir).splitlines()
    assert "INFO rank 1 of 2 begins at step 0 (process" in lines[0] and ", cpu)" in lines[0]
    assert "WARNING step 3 was skipped: loss" in lines[1]
    assert "INFO the fit ended at step 1" in lines[2] and len(lines) == 3


def test_what_ended_the_fit_is_in_the_file(make_trainer):
    trainer = make_trainer()
    log = RankLog()
    log.on_fit_start(trainer)
    with pytest.raises(ValueError, match="no data"):
        try:
            raise ValueError("no data")
        finally:
            log.on_fit_end(trainer)
    log.on_fit_end(trainer)
    assert "ERROR the fit ended at step 0" in said(trainer.model_dir)
    assert "Traceback" in said(trainer.model_dir) and "ValueError: no data" in said(trainer.model_dir)


def test_a_fit_that_goes_on_appends(make_trainer):
    trainer = make_trainer()
    for start in (0, 1, 0):
        trainer.global_step = start
        log = RankLog()
        log.on_fit_start(trainer)
        end_step(log, trainer, samples_per_second=2.0)
        end_step(log, trainer, samples_per_second=2.0)
        log.on_fit_end(trainer)
        assert [row["step"] for row in rows_of(trainer.model_dir)] == [str(n + 1) for n in range(start + 2)]
        assert said(trainer.model_dir).count("begins") == (2 if start else 1)


@pytest.mark.parametrize(("count", "left"), [("2", {"rank_0.csv", "rank_0.log", "rank_1.csv"}), ("1", set())])
def test_files_of_ranks_that_are_no_more_go(make_trainer, monkeypatch, count, left):
    trainer = make_trainer()
    folder = trainer.model_dir / "ranks"
    folder.mkdir()
    for name in ("rank_1.csv", "rank_2.csv", "rank_2.log"):
        (folder / name).write_text("step\n")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", count)
    log = RankLog()
    log.on_fit_start(trainer)
    end_step(log, trainer, samples_per_second=2.0)
    log.on_fit_end(trainer)
    assert {path.name for path in folder.iterdir()} == left


def test_a_folder_that_cannot_be_written(make_trainer):
    trainer = make_trainer()
    (trainer.model_dir / "ranks").write_text("")
    with pytest.raises(RarefyError, match=r"rank_1.csv: cannot be written: .*; free space or fix the perm"):
        RankLog().on_fit_start(trainer)
