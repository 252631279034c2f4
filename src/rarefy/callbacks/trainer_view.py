"""What callbacks and loggers may read of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn


class TrainerView(Protocol):
    """The trainer as its callbacks see it; `rarefy.Trainer` has all of this."""

    @property
    def model(self) -> nn.Module:
        """The model, on its device."""
        ...

    @property
    def optimizer(self) -> Any:
        """The optimizer; None when the trainer only validates."""
        ...

    @property
    def schedulers(self) -> Any:
        """The learning-rate schedulers, in order."""
        ...

    @property
    def sparsity(self) -> Any:
        """The sparsity algorithm or group; None for a dense run."""
        ...

    @property
    def global_step(self) -> int:
        """Optimizer steps taken so far."""
        ...

    @property
    def total_steps(self) -> int:
        """The global step at which the fit ends."""
        ...

    @property
    def is_log_step(self) -> bool:
        """Whether the step in progress, or the one that just ended, is logged."""
        ...

    @property
    def model_dir(self) -> Path:
        """Where logs and checkpoints go."""
        ...

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        ...

    @property
    def precision(self) -> Any:
        """Autocast, loss scaling and gradient clipping."""
        ...

    @property
    def last_metrics(self) -> dict[str, float]:
        """The latest value of every metric that was logged."""
        ...

    @property
    def tokens_per_step(self) -> int | None:
        """Tokens in one optimizer step; None where the data are not tokens."""
        ...

    @property
    def loop(self) -> Any:
        """The settings of the training loop."""
        ...

    @property
    def checkpoint(self) -> Any:
        """The checkpoint settings."""
        ...

    @property
    def params(self) -> dict[str, Any]:
        """The configuration, as plain YAML values; empty where there is none."""
        ...

    def log_metrics(self, **metrics: float) -> None:
        """Send metrics to every logger, at the present global step."""
        ...

    def log_metrics_dict(self, metrics: dict[str, float]) -> None:
        """The same for names that are no Python identifiers."""
        ...
