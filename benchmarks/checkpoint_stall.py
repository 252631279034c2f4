"""How long a checkpoint holds up training, beside a plain save: `python benchmarks/checkpoint_stall.py`.

A model of 100M parameters trains with AdamW. Runs of a few steps take turns: one without a checkpoint, one with
a plain `torch.save` of model and optimizer state after the first step, one with rarefy's checkpoint of the same
tensors there (copied in memory, then written, hashed and fsynced while training goes on). For both:

- blocked: how long the call itself lasts;
- total: how much longer the whole run takes. This also counts that the writer competes for processors and
  memory, and the wait at the end for a checkpoint that is not on the disk yet.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from interleave import medians
from torch import Tensor, nn

from rarefy.checkpoint.directory import CheckpointParts, CheckpointWriter

LIMIT = 1.3
WIDTH = 2500


class Run:
    """A model in training, and the ways to save it.

    Args:
        folder: where to save.
        layers: of 6.25M parameters each.
        steps: of one run, with one checkpoint.
    """

    def __init__(self, folder: Path, layers: int, steps: int) -> None:
        torch.manual_seed(0)
        self.folder, self.steps = folder, steps
        self.model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(layers)))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        self.batch = torch.randn(64, WIDTH)
        self.writer = CheckpointWriter(folder / "rarefy", keep_last=1)
        self.blocked: dict[str, list[float]] = {"plain": [], "torch": [], "rarefy": []}
        self.count = 0

    def train(self, name: str, save: Callable[[], object]) -> None:
        """A run that saves after its first step."""
        for step in range(self.steps):
            self._step(self.batch)
            if step == 0:
                begin = time.perf_counter()
                save()
                self.blocked[name].append(time.perf_counter() - begin)
        self.writer.wait()

    def save_with_torch(self) -> None:
        """What one would write by hand."""
        states = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(states, self.folder / "plain.pt")

    def save_with_rarefy(self) -> None:
        """The same tensors as a checkpoint."""
        self.count += 1
        parts = CheckpointParts(self.model.state_dict(), self.optimizer.state_dict())
        self.writer.save_async(self.count, parts)

    def _step(self, batch: Tensor) -> None:
        self.model(batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def measure(run: Run, rounds: int) -> dict[str, tuple[float, float]]:
    """Blocked and total seconds of both ways to save, medians over all rounds."""
    ways: dict[str, Callable[[], object]] = {
        "plain": lambda: None,
        "torch": run.save_with_torch,
        "rarefy": run.save_with_rarefy,
    }
    runs = {name: lambda name=name, save=save: run.train(name, save) for name, save in ways.items()}
    total = medians(runs, rounds, warmup=1)
    return {
        name: (statistics.median(run.blocked[name][1:]), total[name] - total["plain"])
        for name in ("torch", "rarefy")
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="checkpoint stall")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=16, help="6.25M parameters each")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_stall_", dir=args.folder))
    try:
        seconds = measure(Run(folder, args.layers, args.steps), args.rounds)
    finally:
        shutil.rmtree(folder)
    for name, (blocked, total) in seconds.items():
        print(f"{name}: blocked {blocked:.2f} s, total {total:.2f} s")
    for index, kind in enumerate(("blocked", "total")):
        ratio = seconds["rarefy"][index] / seconds["torch"][index]
        print(f"rarefy / torch.save, {kind}: {ratio:.2f} (limit {LIMIT})")


if __name__ == "__main__":
    main()
