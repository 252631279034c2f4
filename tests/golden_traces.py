"""Short training runs whose losses and masks were recorded once; `python tests/golden_traces.py` records them again."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import rarefy

RECORDED = Path(__file__).with_name("golden_traces.json")
STEPS, RESUMED_AT = 12, 5
UPDATE = {"freq": 3, "start": 0}
ANNEALED = {"type": "cosine", "init": 0.4, "half_period": 20}
CUBIC = {"type": "polynomial", "init": 0.2, "final": 0.8, "start": 0, "stop": 9}

BLOCKS: Mapping[str, Any] = {
    "static": {"algorithm": "static", "sparsity": 0.75},
    "gmp": {"algorithm": "gmp", "sparsity": CUBIC, "init_method": "topk", "update": UPDATE},
    "set": {"algorithm": "set", "sparsity": 0.75, "drop_fraction": ANNEALED, "update": UPDATE},
    "rigl": {"algorithm": "rigl", "sparsity": 0.75, "drop_fraction": ANNEALED, "update": UPDATE},
    "rigl_late": {"algorithm": "rigl", "sparsity": [0.5, 0.7], "update": {"freq": 4, "start": 2}},
    "rigl_erk": {"algorithm": "rigl", "sparsity": 0.7, "distribution": "erk", "update": UPDATE},
    "set_grouped": {"algorithm": "set", "sparsity": 0.75, "balance_out_groups": 4, "update": UPDATE},
    "rigl_grouped": {"algorithm": "rigl", "sparsity": 0.75, "balance_in_groups": 2, "update": UPDATE},
    "gmp_2_of_4": {
        "algorithm": "gmp",
        "sparsity": {"type": "polynomial", "init": 0, "final": 0.5, "start": 0, "stop": 9},
        "pattern": {"n": 2, "m": 4},
        "update": UPDATE,
    },
    "rigl_blocks": {"algorithm": "rigl", "sparsity": 0.75, "pattern": {"block": [2, 4]}, "update": UPDATE},
    "group": [
        {"algorithm": "static", "sparsity": 0.5, "param_filter": "0.*weight"},
        {"algorithm": "rigl", "sparsity": 0.75, "update": UPDATE},
    ],
}
STORAGES = ("masked", "compact")


def block_of(name: str, storage: str) -> Any:
    """A `sparsity:` block with seed and storage."""
    entries = BLOCKS[name] if isinstance(BLOCKS[name], list) else [BLOCKS[name]]
    complete = [{**entry, "compute": storage, "seed": 3} for entry in entries]
    return complete if isinstance(BLOCKS[name], list) else complete[0]


def network() -> nn.Module:
    """Three linear layers in float64, of sizes that every pattern divides."""
    torch.manual_seed(0)
    layers = nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 8)
    return nn.Sequential(*layers).double()


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    """The loss of a step's inputs, which are functions of the step alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    x = torch.randn(16, 24, generator=generator, dtype=torch.float64)
    return (model(x) - x[:, :8].sin()).square().mean()


def checksums(sparsity: Any) -> list[int]:
    """Of the mask of each sparse weight, in order."""
    masks = [p.mask for a in sparsity.algorithms for p in a.parameters.values()]
    return [zlib.crc32(mask.contiguous().numpy().tobytes()) for mask in masks]


class Loop:
    """A plain loop with its model, optimizer and sparsity."""

    def __init__(self, name: str, storage: str) -> None:
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.sparsity = rarefy.configure(block_of(name, storage))
        self.sparsity.apply(self.model)
        self.sparsity.apply(self.optimizer)

    def step(self, number: int) -> dict[str, Any]:
        """Takes a step; what is recorded of it."""
        self.optimizer.zero_grad()
        loss = loss_of(self.model, number)
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), "masks": checksums(self.sparsity)}


def resumed(first: Loop, name: str, storage: str) -> Loop:
    """A new loop with the state of the first."""
    second = Loop(name, storage)
    second.model.load_state_dict(first.model.state_dict())
    second.sparsity.load_state_dict(first.sparsity.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    return second


def loop_trace(name: str, storage: str, *, resumes: bool) -> list[dict[str, Any]]:
    """Losses and masks of a plain loop, resumed in the middle from its state dicts if wanted."""
    loop, trace = Loop(name, storage), []
    for number in range(STEPS):
        if resumes and number == RESUMED_AT:
            loop = resumed(loop, name, storage)
        trace.append(loop.step(number))
    return trace


class Regression(nn.Module):
    """The same network as a model for the trainer: a batch is the number of its step."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return loss_of(self.net, int(batch))


class Recorder(rarefy.callbacks.Callback):
    """Keeps the loss and the masks of each step."""

    def __init__(self) -> None:
        self.trace: list[dict[str, Any]] = []

    def on_train_batch_end(self, trainer: Any, metrics: dict[str, Any]) -> None:
        self.trace.append({"loss": float(metrics["loss"]), "masks": checksums(trainer.sparsity)})


def trainer_trace(name: str, storage: str, folder: Path, *, resumes: bool) -> list[dict[str, Any]]:
    """Losses and masks under the trainer, and the sum of the final weights; stopped and resumed if wanted."""
    recorder = Recorder()
    entries = block_of(name, storage)
    for entry in entries if isinstance(entries, list) else [entries]:
        if "param_filter" in entry:
            entry["param_filter"] = "net." + entry["param_filter"]
    trainer: Any = None
    for stop in (RESUMED_AT, STEPS) if resumes else (STEPS,):
        trainer = rarefy.Trainer(
            model=Regression,
            optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
            sparsity=rarefy.configure(entries),
            loop={"max_steps": stop},
            callbacks=[recorder],
            model_dir=folder,
            device="cpu",
            seed=1,
        )
        trainer.fit([torch.tensor(number) for number in range(STEPS)])
    total = sum(parameter.detach().double().abs().sum().item() for parameter in trainer.model.parameters())
    return [*recorder.trace, {"total": total}]


def traces(folder: Path) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Every trace with its name."""
    for name in BLOCKS:
        for storage in STORAGES:
            yield f"loop/{name}/{storage}", loop_trace(name, storage, resumes=False)
            yield (
                f"trainer/{name}/{storage}",
                trainer_trace(name, storage, folder / f"{name}_{storage}", resumes=False),
            )


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        RECORDED.write_text(json.dumps(dict(traces(Path(folder))), indent=0) + "\n")
