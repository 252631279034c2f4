"""torchrun restarts the processes of a run after one was killed: the result is that of a run that was not."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import rarefy
from ranks import NEEDS_FULLY_SHARD
from rarefy.checkpoint.directory import load

CODE = """
import os, signal

from rarefy.callbacks import Callback


class Killer(Callback):
    def on_train_batch_end(self, trainer, metrics):
        is_victim = os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if is_victim and trainer.global_step == int(os.environ["KILL_AT"]):
            os.kill(os.getpid(), signal.SIGKILL)
"""
PARAMS = """
trainer:
  init:
    device: cpu
    seed: 1
    model_dir: md
    model: {name: gpt2, num_hidden_layers: 1, vocab_size: 256, max_position_embeddings: 8, hidden_size: 16,
      num_heads: 2, filter_size: 16}
    optimizer: {AdamW: {lr: 0.01}}
    sparsity: {algorithm: set, sparsity: 0.5, update: {freq: 2}}
    parallel: {strategy: STRATEGY}
    loop: {max_steps: 8}
    checkpoint: {steps: 3}
    callbacks: [{"./killer.py:Killer": {}}]
  fit:
    train_dataloader: {data_processor: TextCorpusDataProcessor, source: a.txt, sequence_length: 8, batch_size: 2}
"""


def train(folder: Path, kill_at: int, strategy: str) -> dict[str, torch.Tensor]:
    """The weights and masks of the last checkpoint."""
    folder.mkdir()
    (folder / "killer.py").write_text(CODE)
    (folder / "params.yaml").write_text(PARAMS.replace("STRATEGY", strategy))
    (folder / "a.txt").write_bytes(bytes(range(256)) * 4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    # The rendezvous that torchrun has by default, whose store outlives the processes.
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--max-restarts",
        "1",
        "--master-port",
        port,
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(rarefy.__file__).parents[1]),
        "OMP_NUM_THREADS": "1",
        "KILL_AT": str(kill_at),
    }
    run = subprocess.run(
        [sys.executable, *torchrun, "-m", "rarefy", "run", "params.yaml"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert run.returncode == 0, run.stderr
    return dict(load(folder / "md" / "checkpoint_8").model)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp2", marks=NEEDS_FULLY_SHARD)])
def test_a_killed_process_changes_nothing(tmp_path: Path, strategy: str) -> None:
    killed = train(tmp_path / "killed", 5, strategy)
    assert "begins at step 3" in (tmp_path / "killed" / "md" / "ranks" / "rank_1.log").read_text()
    whole = train(tmp_path / "whole", 0, strategy)
    assert killed.keys() == whole.keys()
    assert all(torch.equal(killed[name], whole[name]) for name in whole)
