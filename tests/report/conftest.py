"""Runs to look at."""

from pathlib import Path

import pytest

import tiny_run
from rarefy.report.run_data import Run, read_run

RIGL = {
    **tiny_run.SPARSITY["rigl"],
    "balance_out_groups": 4,
    "param_filter": ["body.weight", "middle.weight"],
}


def train(folder: Path, **init: object) -> Path:
    """Trains; the model directory."""
    params = tiny_run.write(folder, tiny_run.configuration(folder, **{"sparsity": RIGL, **init}))
    result = tiny_run.rarefy("run", params, "--set", "trainer.init.logging.log_steps=1")
    assert result.exit_code == 0, result.output
    return folder / "out"


@pytest.fixture(scope="session")
def logged_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with everything turned on."""
    return train(tmp_path_factory.mktemp("logged"), callbacks=[{"LogSparsity": {}}])


@pytest.fixture(scope="session")
def plain_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run as it comes."""
    return train(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def logged(logged_dir: Path) -> Run:
    return read_run(logged_dir, pytest.fail)


@pytest.fixture(scope="session")
def plain(plain_dir: Path) -> Run:
    return read_run(plain_dir, pytest.fail)
