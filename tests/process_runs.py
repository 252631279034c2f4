"""Runs of the command line in several processes that are killed: all after a step, or one at a moment, then the rest.

Each process notes the samples that it trained on, in the order in which it did.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from forks import copies
from rarefy.callbacks import Callback

STEPS = 8
PARAMS = """
trainer:
  init:
    device: cpu
    seed: 1
    model_dir: md
    model: {{name: gpt2, num_hidden_layers: 1, vocab_size: 256, max_position_embeddings: 8, hidden_size: 16,
      num_heads: 2, filter_size: 16, dropout_rate: 0.0, attention_dropout_rate: 0.0}}
    optimizer: {{SGD: {{lr: 0.2, momentum: 0.9}}}}
    sparsity: {{algorithm: set, sparsity: 0.5, update: {{freq: 2}}}}
    parallel: {{strategy: {strategy}}}
    loop: {{max_steps: {steps}}}
    checkpoint: {{steps: {saves}}}
    callbacks: [{{"{file}:Killer": {{}}}}]
  fit:
    train_dataloader: {{data_processor: TextCorpusDataProcessor, source: a.txt, sequence_length: 8, batch_size: 4}}
"""


class Killer(Callback):
    """Kills its process after a step, or at a moment of all that happens, which the environment tells."""

    def __init__(self) -> None:
        self.seen = 0

    def on_train_batch_start(self, trainer: Any, batch: Any, micro_step: int) -> None:
        rank = os.environ.get("RANK", "0")
        with open(f"samples_{rank}.txt", "a") as file:
            for sample in batch["input_ids"].tolist():
                print(trainer.global_step, *sample, file=file)
        moment(self)

    def on_after_backward(self, trainer: Any) -> None:
        moment(self)

    def on_train_batch_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        moment(self)
        if trainer.global_step == int(os.environ.get("KILL_AFTER_STEP", "0")):
            trainer.writer.wait()
            if torch.distributed.is_initialized():
                torch.distributed.barrier()
            die()


def moment(killer: Any) -> None:
    """Another one of the moments at which a process may die."""
    killer.seen += 1
    if killer.seen == int(os.environ.get("KILL_AT_MOMENT", "0")):
        die()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def made(folder: Path, strategy: str, saves: int = 3) -> Path:
    """A folder with a run in it."""
    folder.mkdir()
    content = PARAMS.format(strategy=strategy, file=__file__, steps=STEPS, saves=saves)
    (folder / "params.yaml").write_text(content)
    (folder / "a.txt").write_bytes(bytes((7 * place * place + place // 5) % 256 for place in range(2048)))
    return folder


def samples(folder: Path) -> list[set[tuple[int, ...]]]:
    """For each step the samples that were trained on in it, whichever process did."""
    lines = [line for file in folder.glob("samples_*.txt") for line in file.read_text().splitlines()]
    rows = [tuple(map(int, line.split())) for line in lines]
    return [{row[1:] for row in rows if row[0] == step} for step in range(STEPS)]


def run(folder: Path, count: int, environment: Callable[[int], dict[str, str]] = lambda _: {}) -> list[Any]:
    """The exit codes of so many processes, as torchrun would start them; when one dies, the others are killed.

    Args:
        folder: as `made` makes it.
        count: of processes.
        environment: of the process of a rank.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = copies()
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    started: list[BaseProcess] = []
    for rank in range(count):
        place = {**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} if count > 1 else {}
        one = context.Process(target=_child, args=(str(folder), {**place, **environment(rank)}))
        one.start()
        started.append(one)
    _watch(started)
    return [one.exitcode for one in started]


def _watch(started: list[BaseProcess]) -> None:
    """Waits for all; once one has ended badly, or none does any more, the others end too."""
    while running := [one for one in started if one.exitcode is None]:
        ended = wait([one.sentinel for one in running], timeout=240)
        for one in started:
            one.join(0)
        if not ended or any(one.exitcode for one in started):
            for one in running:
                one.kill()
                one.join()


def _child(folder: str, environment: dict[str, str]) -> None:
    from rarefy.cli.app import app

    torch.set_num_threads(1)
    os.environ |= environment
    os.chdir(folder)
    _count_flushes(int(environment.get("KILL_AT_FLUSH", "0")))
    with open("said.txt", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        app(["run", "params.yaml"])


def _count_flushes(last: int) -> None:
    """Lets the process die at a flush to the disk, that is in the midst of writing a checkpoint."""
    flush = os.fsync
    seen = 0

    def flush_or_die(descriptor: Any) -> None:
        nonlocal seen
        seen += 1
        if seen == last:
            die()
        flush(descriptor)

    if last:
        os.fsync = flush_or_die
