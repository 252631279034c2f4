"""The loop that all libraries for torch share; what each adds to it is in its own file."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn

from .setting import CLASSES, INPUTS, WIDTH, Setting


def network(linear: Callable[[int, int], nn.Module] = nn.Linear) -> nn.Sequential:
    """Two hidden layers."""
    return nn.Sequential(
        linear(INPUTS, WIDTH), nn.ReLU(), linear(WIDTH, WIDTH), nn.ReLU(), linear(WIDTH, CLASSES)
    )


def adamw(model: nn.Module, setting: Setting) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=setting.lr, weight_decay=0.01)


def loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    setting: Setting,
    after_step: Callable[[int], object] = lambda step: None,
) -> Callable[[np.ndarray], np.ndarray]:
    """Trains; `after_step` gets the number of the step, from 1."""
    for step, (x, y) in enumerate(setting.batches()):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * setting.rate(step)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.from_numpy(x)), torch.from_numpy(y)).backward()
        optimizer.step()
        after_step(step + 1)

    def predict(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(x)).argmax(1).numpy()

    return predict


def zeros_of(model: nn.Module) -> float:
    """The share of zeros among the weights of linear layers."""
    weights = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    return 1 - sum(int(weight.count_nonzero()) for weight in weights) / sum(
        weight.numel() for weight in weights
    )


def start(setting: Setting) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(setting.seed)
