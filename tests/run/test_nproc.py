"""`rarefy run --nproc N`: several processes from one command, whose end and faults are those of one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import yaml

from forks import Script, rarefy_in
from rarefy.cli.processes import refuse_nested, without_flag
from rarefy.errors import RarefyError

CODE = """
import os, time

from rarefy.callbacks import Callback


class Watch(Callback):
    def on_train_batch_end(self, trainer, metrics):
        open(f"pid_{os.environ['RANK']}", "w").write(str(os.getpid()))
        time.sleep(0.02)
"""


def start(folder: Path, *flags: str) -> Script:
    (folder / "watch.py").write_text(CODE)
    (folder / "a.txt").write_bytes(bytes(range(256)) * 4)
    sizes = {
        "vocab_size": 256,
        "max_position_embeddings": 8,
        "hidden_size": 16,
        "num_heads": 2,
        "filter_size": 16,
    }
    init = {
        "device": "cpu",
        "model_dir": "md",
        "model": {"name": "gpt2", "num_hidden_layers": 1, **sizes},
        "optimizer": {"AdamW": {"lr": 0.01}},
        "sparsity": {"algorithm": "set", "sparsity": 0.5, "update": {"freq": 2}},
        "loop": {"max_steps": 4},
        "callbacks": [{"./watch.py:Watch": {}}],
    }
    data = {
        "data_processor": "TextCorpusDataProcessor",
        "source": "a.txt",
        "sequence_length": 8,
        "batch_size": 2,
    }
    file = folder / "params.yaml"
    file.write_text(yaml.safe_dump({"trainer": {"init": init, "fit": {"train_dataloader": data}}}))
    return rarefy_in(folder, "run", "params.yaml", "--nproc", "2", *flags)


def wait_for(file: Path, run: Script) -> int:
    end = time.monotonic() + 240
    while time.monotonic() < end and run.is_alive():
        if file.exists() and file.read_text():
            return int(file.read_text())
        time.sleep(0.05)
    raise AssertionError(run.end())


def ended(run: Script) -> tuple[int, str]:
    """The exit code, and all that was said."""
    code, said, complaints = run.end()
    return code, said + complaints


def test_two_processes_train_and_a_killed_one_ends_the_other(tmp_path: Path) -> None:
    run = start(tmp_path)
    code, said = ended(run)
    assert code == 0, said
    assert said.count("actual sparsity") == 1
    assert {"pid_0", "pid_1", "md"} <= set(os.listdir(tmp_path))
    (tmp_path / "pid_1").unlink()

    run = start(tmp_path, "--max_steps", "100000")
    os.kill(wait_for(tmp_path / "pid_1", run), signal.SIGKILL)
    code, said = ended(run)
    assert code == 1, said
    message = (
        "Error: process 1 of 2 was ended by SIGKILL, and the others with it; the same command goes on from"
    )
    assert message in said and "Traceback" not in said


def test_ctrl_c_to_all_processes_saves_once_and_ends_with_130(tmp_path: Path) -> None:
    run = start(tmp_path, "--max_steps", "100000")
    wait_for(tmp_path / "pid_0", run)
    os.killpg(run.pid, signal.SIGINT)
    code, said = ended(run)
    assert code == 130, said
    assert "stopped by SIGINT after step" in said and "Traceback" not in said
    assert [name for name in os.listdir(tmp_path / "md") if name.startswith("checkpoint_")]


def test_a_wrong_file_is_said_once_before_any_process_is_started(tmp_path: Path) -> None:
    run = start(tmp_path, "--set", "trainer.init.sparsity.sparsty=0.3")
    code, said = ended(run)
    assert code == 2
    assert said.count("Error") == 1 and "did you mean sparsity?" in said


def test_processes_do_not_start_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(
        RarefyError, match="--nproc 2 in a process that torchrun started is not allowed; give one of them"
    ):
        refuse_nested(2)


def test_each_process_gets_the_same_command() -> None:
    assert without_flag(["run", "--nproc=2", "a.yaml", "--nproc", "3", "-o", "x"]) == [
        "run",
        "a.yaml",
        "-o",
        "x",
    ]
