"""What the Trainer costs over the same loop written by hand: `python benchmarks/trainer_overhead.py`.

Both take turns, one step each, on equal models and the same batches; medians over all steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rarefy.models import GPTConfig, GPTModel
from rarefy.models.call import loss_of
from rarefy.trainer.trainer import Trainer

LIMIT = 1.02
WARM_UP = 5


class Layers(nn.Module):
    """Four linear layers and a squared error."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))

    def forward(self, batch: Tensor) -> Tensor:
        """The loss of a batch, which is input and target at once."""
        return nn.functional.mse_loss(self.layers(batch), batch)


@dataclass
class Turns:
    """Data for the trainer that takes a step of the hand-written loop before each batch it gives.

    Args:
        batches: what both train on.
        by_hand: one step of the hand-written loop.
    """

    batches: list
    by_hand: Callable
    hand: list[float] = field(default_factory=list)
    trainer: list[float] = field(default_factory=list)

    def __iter__(self) -> Iterator:
        for batch in self.batches:
            begin = time.perf_counter()
            self.by_hand(batch)
            middle = time.perf_counter()
            yield batch
            self.hand.append(middle - begin)
            self.trainer.append(time.perf_counter() - middle)

    def ratio(self) -> float:
        """Median step of the trainer over median step by hand."""
        return statistics.median(self.trainer[WARM_UP:]) / statistics.median(self.hand[WARM_UP:])


def by_hand(model: nn.Module, clip: bool) -> Callable:
    """The loop that one would write without a trainer, as a function of a batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))

    def step(batch: object) -> float:
        loss = loss_of(model(batch))
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        scheduler.step()
        return loss.item()

    return step


def measure(make_model: Callable[[], nn.Module], batches: list, clip: bool) -> Turns:
    """Both loops over the same batches."""
    turns = Turns(batches, by_hand(make_model(), clip))
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model_dir=folder,
            model=make_model,
            device="cpu",
            optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=1e-4),
            schedulers=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, _decay),
            precision={"enabled": False, "max_gradient_norm": 1.0} if clip else None,
            loop={"num_steps": len(batches)},
            loggers=[],
        )
        trainer.fit(turns, ckpt_path=None)
    return turns


def _decay(step: int) -> float:
    return 1 / (1 + step)


def cases(steps: int) -> dict[str, tuple[Callable[[], nn.Module], list]]:
    """Model and batches by name."""
    generator = torch.Generator().manual_seed(0)
    config = GPTConfig(vocab_size=256, hidden_size=128, num_hidden_layers=4, num_heads=4, filter_size=512)
    tokens = torch.randint(0, 256, (steps, 8, 129), generator=generator)
    text = [
        {"input_ids": t[:, :-1], "labels": t[:, 1:], "attention_mask": torch.ones(8, 128)}
        for t in tokens.to(torch.int32)
    ]
    vectors = list(torch.randn(steps, 256, 2048, generator=generator))
    return {
        "4 linear layers of 2048, batch 256": (lambda: Layers(2048), vectors),
        "GPT, 4 layers of 128, batch 8 x 128": (lambda: GPTModel(config), text),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    for name, (make_model, batches) in cases(parser.parse_args().steps).items():
        for clip in (True, False):
            turns = measure(make_model, batches, clip)
            by_hand_ms = statistics.median(turns.hand[WARM_UP:]) * 1e3
            what = f"{name}, {'with' if clip else 'without'} clipping"
            print(f"{what}: by hand {by_hand_ms:.2f} ms, trainer / by hand = {turns.ratio():.4f}", flush=True)


if __name__ == "__main__":
    main()
