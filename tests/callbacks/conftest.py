"""A trainer that only does what callbacks may ask of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rarefy.callbacks.events import Logger


class FakeTrainer:
    """Counts steps, logs on multiples of `log_every` and keeps what was logged."""

    def __init__(self, model_dir: Path, sparsity: Any, log_every: int) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.sparsity = sparsity
        if sparsity is not None:
            sparsity.apply(self.model)
            sparsity.apply(self.optimizer)
        self.model_dir, self.log_every = model_dir, log_every
        self.global_step, self.total_steps, self.is_log_step = 0, 100, False
        self.device, self.tokens_per_step = torch.device("cpu"), None
        self.schedulers = self.precision = self.loop = self.checkpoint = None
        self.params: dict[str, Any] = {"loop": {"max_steps": 100}}
        self.last_metrics: dict[str, float] = {}
        self.logged: list[tuple[int, dict[str, float]]] = []
        self.loggers: list[Logger] = []

    def log_metrics(self, **metrics: float) -> None:
        self.log_metrics_dict(metrics)

    def log_metrics_dict(self, metrics: dict[str, float]) -> None:
        self.logged.append((self.global_step, metrics))
        for logger in self.loggers:
            logger.log(self, metrics, self.global_step)

    def step(self, callback: Any) -> None:
        """One optimizer step with the events that the callbacks under test use."""
        self.is_log_step = (self.global_step + 1) % self.log_every == 0
        self.optimizer.zero_grad()
        batch = torch.randn(3, 8)
        callback.on_before_forward(self, batch)
        outputs = self.model(batch)
        callback.on_after_forward(self, outputs, batch)
        outputs.square().sum().backward()
        callback.on_before_optimizer_step(self)
        self.optimizer.step()
        self.global_step += 1
        callback.on_train_batch_end(self, {})


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., FakeTrainer]:
    def make(sparsity: Any = None, log_every: int = 1, model_dir: Path = tmp_path) -> FakeTrainer:
        return FakeTrainer(model_dir, sparsity, log_every)

    return make
