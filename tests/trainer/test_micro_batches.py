"""Batches that are learnt part by part, with the result of the whole; and what does not fit is said first."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import ConfigError
from rarefy.models import GPTModel, build_model
from rarefy.trainer.micro_batches import Needed, choose_size, needed_for, parts_of
from rarefy.trainer.session import Session

GIB = 2**30
SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "num_heads": 2,
    "num_hidden_layers": 2,
    "filter_size": 24,
    "max_position_embeddings": 12,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
KINDS: dict[str, dict[str, Any]] = {
    "num_tokens": {"name": "gpt2"},
    "batch_size": {"name": "gpt2", "loss_scaling": "batch_size", "loss_weight": 0.5},
    "experts": {"name": "mixtral", "moe": {"num_experts": 4, "top_k": 2, "load_balancing_loss_coef": 0.5}},
}


def batch(samples: int = 5) -> dict[str, Tensor]:
    """Sequences of unequal lengths, one of them empty."""
    ids = (torch.arange(samples * 13) * 7 % 16).reshape(samples, 13)
    lengths = torch.tensor([12, 3, 0, 7, 1])[:samples].unsqueeze(1)
    mask = (torch.arange(12) < lengths).int()
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": mask}


def model_of(kind: str) -> GPTModel:
    torch.manual_seed(0)
    model = build_model({**SIZES, **KINDS[kind]}).double()
    assert isinstance(model, GPTModel)
    return model


def trained(
    folder: Path, kind: str, size: int | str | None, **loop: Any
) -> tuple[rarefy.Trainer, list[float]]:
    losses: list[float] = []

    class Record(rarefy.callbacks.Callback):
        def on_train_batch_end(self, trainer: Any, metrics: dict[str, float]) -> None:
            losses.append(metrics["loss"])

    trainer = rarefy.Trainer(
        model_dir=folder,
        model=model_of(kind),
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        sparsity={"algorithm": "rigl", "sparsity": 0.5, "update": {"freq": 2}},
        loop={"num_steps": 5, "micro_batch_size": size, **loop},
        callbacks=[Record()],
        loggers=[],
        seed=1,
    )
    trainer.fit([batch(), batch(4), batch(3)])
    return trainer, losses


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_gradients_are_those_of_the_whole_batch(kind: str, size: int) -> None:
    whole, split = model_of(kind), model_of(kind)
    loss = whole(batch())
    loss.backward()
    losses = [split(part) for part in split.parts_of(batch(), size)]
    for part in losses:
        part.backward()
    torch.testing.assert_close(torch.stack(losses).sum(), loss, rtol=1e-13, atol=0)
    for one, other in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_same(tmp_path: Path, kind: str) -> None:
    loop = {"grad_accum_steps": 2}
    whole, expected = trained(tmp_path / "whole", kind, None, **loop)
    split, found = trained(tmp_path / "split", kind, 2, **loop)
    assert found == pytest.approx(expected, rel=1e-6)
    states = (split.model.state_dict(), whole.model.state_dict())
    for name, tensor in states[1].items():
        torch.testing.assert_close(states[0][name], tensor, rtol=1e-9, atol=1e-11, msg=name)


def test_validation_is_the_same(tmp_path: Path) -> None:
    whole, _ = trained(tmp_path / "whole", "num_tokens", None)
    split, _ = trained(tmp_path / "split", "num_tokens", 2)
    expected = whole.validate([batch(), batch(2)], None)
    assert split.validate([batch(), batch(2)], None) == pytest.approx(expected, rel=1e-9)


def test_every_part_is_a_micro_batch_to_callbacks(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    class Watch(rarefy.callbacks.Callback):
        def on_train_batch_start(self, trainer: Any, batch: Any, micro_step: int) -> None:
            seen.append((micro_step, len(batch["labels"])))

    trainer = rarefy.Trainer(
        model_dir=tmp_path,
        model=model_of("num_tokens"),
        device="cpu",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        loop={"num_steps": 1, "micro_batch_size": 2, "grad_accum_steps": 2},
        callbacks=[Watch()],
        loggers=[],
    )
    trainer.fit([batch(5), batch(2)])
    assert seen == [(0, 2), (1, 2), (2, 1), (3, 2)]


def session(tmp_path: Path, size: int | str | None, model: nn.Module | None = None) -> Session:
    return rarefy.Trainer(
        model_dir=tmp_path,
        model=model_of("num_tokens") if model is None else model,
        device="cpu",
        optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01),
        loop={"num_steps": 1, "micro_batch_size": size},
        loggers=[],
    ).session


def test_what_a_step_needs(tmp_path: Path) -> None:
    made = session(tmp_path, None)
    numbers = sum(one.numel() for one in made.model.parameters())
    needed = needed_for(made, batch())
    assert (needed.gradients, needed.optimizer) == (8 * numbers, 16 * numbers)
    assert isinstance(made.model, GPTModel)
    assert needed.activations == made.model.activation_bytes(1, 12, 8)
    assert needed.of(3) == 24 * numbers + 3 * needed.activations
    assert Needed(10, 20, 7).fitting(50) == 2 and Needed(10, 20, 7).fitting(20) == 0


@pytest.mark.parametrize(("room", "expected"), [(5.5, 5), (3.5, 2), (1.5, 1)])
def test_auto_takes_what_fits(tmp_path: Path, room: float, expected: int) -> None:
    made = session(tmp_path, "auto")
    needed = needed_for(made, batch())
    choose_size(made, batch(), available=int(needed.of(0) + room * needed.activations))
    assert made.micro_batch_size == expected
    assert len(parts_of(made, batch())) == -(-5 // expected)


def test_what_cannot_fit_is_refused_with_what_would(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = session(tmp_path, None)
    needed = needed_for(made, batch())
    with pytest.raises(ConfigError) as caught:
        choose_size(made, batch(), available=int(needed.of(0) + 2.5 * needed.activations))
    assert "a batch of 5 samples, which takes 0.0 GiB beside the weights (gradients" in str(caught.value)
    assert str(caught.value).endswith("give loop.micro_batch_size: 2 (the same result)")
    with pytest.raises(ConfigError, match="give a smaller model or more memory"):
        choose_size(made, batch(), available=needed.gradients)
    with caplog.at_level(logging.WARNING, "rarefy"):
        choose_size(made, batch(), available=int(0.9 * needed.of(5)))
    assert "it may not fit: loop.micro_batch_size: 4 (the same result)" in caplog.text


def test_a_model_that_does_not_tell_how_its_loss_is_divided(tmp_path: Path) -> None:
    class Mean(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input).mean()

    made = session(tmp_path, 2, Mean(3, 1))
    choose_size(made, torch.ones(4, 3))
    assert len(parts_of(made, torch.ones(2, 3))) == 1
    with pytest.raises(
        ConfigError, match=r"loop.micro_batch_size: 2 for Mean, which has no `parts_of`, is not"
    ):
        parts_of(made, torch.ones(4, 3))
    made = session(tmp_path, "auto", Mean(3, 1))
    choose_size(made, torch.ones(4, 3), available=GIB)
    assert made.micro_batch_size == 1
