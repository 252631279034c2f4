"""Event files that TensorBoard reads."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rarefy.callbacks import TensorBoardLogger
from rarefy.errors import RarefyError


def read(directory) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(directory)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def fit(trainer, start: int, stop: int, value: float, *, is_killed: bool = False) -> None:
    logger = TensorBoardLogger()
    trainer.global_step = start
    logger.on_fit_start(trainer)
    for step in range(start + 1, stop + 1):
        logger.log(trainer, {"loss": value, "sparsity/fc*/target": 0.5}, step)
    logger.on_validate_end(trainer, {})
    if not is_killed:
        logger.on_fit_end(trainer)


def test_scalars_reach_the_event_file(make_trainer, tmp_path):
    fit(make_trainer(), 0, 3, 1.5)
    scalars = read(tmp_path / "events")
    assert scalars["loss"] == [(1, 1.5), (2, 1.5), (3, 1.5)]
    assert scalars["sparsity/fc*/target"] == [(1, 0.5), (2, 0.5), (3, 0.5)]


def test_a_resumed_run_has_every_step_once(make_trainer, tmp_path):
    fit(make_trainer(), 0, 5, 1.0, is_killed=True)
    fit(make_trainer(), 3, 6, 2.0)
    assert read(tmp_path / "events")["loss"] == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (6, 2)]


def test_validation_alone_opens_a_file(make_trainer, tmp_path):
    trainer, logger = make_trainer(), TensorBoardLogger()
    logger.on_validate_end(trainer, {})
    assert not (tmp_path / "events").exists()
    logger.log(trainer, {"eval/loss": 2.0}, 7)
    logger.on_validate_end(trainer, {})
    assert read(tmp_path / "events")["eval/loss"] == [(7, 2.0)]
    logger.on_fit_end(trainer)


@pytest.mark.parametrize("directory", ["logs", "deep/er"])
def test_another_directory(make_trainer, tmp_path, directory):
    logger = TensorBoardLogger(summary_dir=directory)
    logger.log(make_trainer(), {"loss": 1.0}, 1)
    logger.on_fit_end(make_trainer())
    assert read(tmp_path / directory)["loss"] == [(1, 1.0)]


def test_a_folder_that_cannot_be_written_is_named(make_trainer, tmp_path):
    (tmp_path / "events").write_text("a file")
    with pytest.raises(RarefyError, match=r"events: cannot be written: .*; free space or fix"):
        TensorBoardLogger().log(make_trainer(), {"loss": 1.0}, 1)
