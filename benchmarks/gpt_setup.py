"""The GPT that the compact benchmarks train: 12 layers of 768, byte vocabulary, through `rarefy.Trainer`."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from rarefy.models import GPTConfig, GPTModel
from rarefy.trainer.step import take_step
from rarefy.trainer.trainer import Trainer

CONFIG = GPTConfig(vocab_size=256, max_position_embeddings=512, dropout_rate=0.0, attention_dropout_rate=0.0)


def gpt_trainer(
    sparsity: Any, *, bf16: bool = False, config: GPTConfig = CONFIG, lr: float = 1e-4
) -> Trainer:
    """A trainer as `rarefy run` builds it: fused AdamW, gradient clipping."""
    return Trainer(
        model_dir=tempfile.mkdtemp(),
        model=lambda: GPTModel(config),
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=lr, fused=True),
        sparsity=sparsity,
        precision={"enabled": bf16, "max_gradient_norm": 1.0},
        loop={"num_steps": 1_000_000},
        loggers=[],
        seed=1,
    )


def batch_of(step: int, samples: int, length: int) -> dict[str, torch.Tensor]:
    """Text-like bytes: every sample repeats a short random phrase, so that there is something to learn."""
    generator = torch.Generator().manual_seed(step)
    phrase = torch.randint(0, 256, (samples, 32), generator=generator)
    tokens = phrase.repeat(1, length // 32 + 1)[:, : length + 1].to(torch.int32)
    ones = torch.ones(samples, length)
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "attention_mask": ones}


def step_of(trainer: Trainer, batch: dict[str, torch.Tensor]) -> float:
    """One optimizer step; its loss."""
    trainer.model.train()
    return take_step(trainer.session, [batch]).loss
