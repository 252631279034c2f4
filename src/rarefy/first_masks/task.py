"""What first masks are made for, and the batches that they are measured on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import ConfigError, RarefyError
from rarefy.initializers import generator_for
from rarefy.models.call import to_device
from rarefy.patterns import Pattern
from rarefy.roles import Place
from rarefy.saliency.objective import Batches, Loss, Shares, own_loss
from rarefy.saliency.synflow import mapped
from rarefy.ties import TieOrder
from rarefy.validation import shorten


@dataclass(frozen=True, kw_only=True)
class Task:
    """Weights that need first masks.

    Args:
        model: that they belong to, on its device.
        weights: dense, by the names of the model's parameters.
        places: the module attribute that holds each.
        patterns: the structure of each.
        targets: the sparsity of each, by the algorithm's distribution.
        sparsity: of all of them together.
        seed: of everything random.
        batches: what to measure on, on the model's device.
        shares: factors of the losses of their parts; None for ones.
        loss: of (model, batch).
        is_by_weight: whether each weight has to have its own target, whatever competition a method would hold.
    """

    model: nn.Module
    weights: Mapping[str, Tensor]
    places: Mapping[str, Place]
    patterns: Mapping[str, Pattern]
    targets: Mapping[str, float]
    sparsity: float
    seed: int
    batches: Batches = ()
    shares: Shares | None = None
    loss: Loss = own_loss
    is_by_weight: bool = False

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(iter(self.weights.values())).device

    def order(self, name: str) -> TieOrder:
        """Decides among equal scores of a weight."""
        return TieOrder.of(generator_for(self.seed, name, 0))

    def keep_top(self, name: str, scores: Tensor, sparsity: float) -> Tensor:
        """The mask of a weight's highest scores, by its pattern."""
        pattern = self.patterns[name]
        order = self.order(name)
        return pattern.merge(
            [pattern.structure.keep_top(piece, sparsity, order) for piece in pattern.split(scores)]
        )


def given_batches(batches: Any, device: torch.device) -> list[list[Any]]:
    """Batches that somebody has in hand, each whole, on a device.

    Args:
        batches: something that gives batches when it is iterated, or a function that returns such a thing.
        device: where to.

    Raises:
        ConfigError: a number, a single tensor or mapping, or no batch.

    Example:
        >>> given_batches(lambda: [torch.ones(2)], torch.device("cpu"))
        [[tensor([1., 1.])]]
    """
    found: Any = batches() if isinstance(batches, Callable) and not isinstance(batches, Iterable) else batches
    several = "a list of batches, or a function that returns one"
    if isinstance(found, int):
        given = f"the number {found} outside of a Trainer"
        raise ConfigError("batches", given, f"the batches themselves: {several}")
    if isinstance(found, Tensor | Mapping | str) or not isinstance(found, Iterable):
        what = f"a tensor of shape {list(found.shape)}" if isinstance(found, Tensor) else shorten(found)
        raise ConfigError("batches", what, several, "batches: [batch]")
    moved = [[mapped(_recordable, to_device(batch, device))] for batch in found]
    if not moved:
        raise ConfigError("batches", "data without a batch", several)
    return moved


def _recordable(tensor: Tensor) -> Tensor:
    """A tensor that a backward pass can save, which one made under `torch.inference_mode()` is not."""
    return tensor.clone() if tensor.is_inference() else tensor


def refuse_inference(model: nn.Module) -> None:
    """Refuses a model with parameters or buffers that were made under `torch.inference_mode()`.

    Raises:
        RarefyError: one is such a tensor, which can neither be written to nor differentiated.

    Example:
        >>> refuse_inference(nn.Linear(2, 2))
    """
    held = itertools.chain(model.named_parameters(), model.named_buffers())
    found = next((name for name, tensor in held if tensor.is_inference()), None)
    if found is not None:
        remedy = "build or load the model outside torch.inference_mode()"
        raise RarefyError(f"{found} is an inference tensor, which cannot be changed; {remedy}")
