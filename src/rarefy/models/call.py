"""One batch: moved to the device, given to the model, counted; and the loss of what comes back."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.models.protocol import ChecksBatch


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch with every tensor in it on `device`; mappings, lists and tuples keep their form.

    Example:
        >>> to_device({"x": [torch.ones(1), "text"]}, torch.device("cpu"))
        {'x': [tensor([1.]), 'text']}
    """
    if isinstance(batch, Tensor):
        # Only a copy out of pinned memory goes on in the background; all others are as ever.
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        # A named tuple takes its fields one by one.
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class ModelCall:
    """Calls a model with a batch as its `forward` wants it.

    A mapping becomes keyword arguments when `forward` has no parameter `batch`, the mapping has one of its
    parameters and lacks none that is required; any other batch is the single argument.

    Args:
        model: the module to call.
        check: the module that may offer `check_batch`; another one than `model` when that is a wrapper.

    Example:
        >>> class Sum(nn.Module):
        ...     def forward(self, x, y=2):
        ...         return (x + y).sum()
        >>> ModelCall(Sum())({"x": torch.ones(2)})
        tensor(6.)
    """

    def __init__(self, model: nn.Module, check: nn.Module | None = None) -> None:
        self.model = model
        checked = model if check is None else check
        self._check = checked.check_batch if isinstance(checked, ChecksBatch) else None
        # Of the model itself: a wrapper's forward takes anything.
        parameters = inspect.signature(checked.forward).parameters.values()
        named = [p for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
        self._names = {p.name for p in named}
        self._required = {p.name for p in named if p.default is p.empty}

    def check(self, batch: Any) -> None:
        """Lets the model refuse a batch, before the batch moves to the device.

        Raises:
            RarefyError: what the model finds wrong with it.
        """
        if self._check is not None:
            self._check(batch)

    def __call__(self, batch: Any) -> Any:
        """What the model returns for `batch`."""
        if isinstance(batch, Mapping) and self._spreads(batch):
            return self.model(**batch)
        return self.model(batch)

    def _spreads(self, batch: Mapping[str, Any]) -> bool:
        return (
            "batch" not in self._names
            and not self._names.isdisjoint(batch)
            and self._required <= batch.keys()
        )


def loss_of(outputs: Any) -> Tensor:
    """The loss in what a model returned.

    Args:
        outputs: a tensor of one element, a tuple or list that begins with one, a mapping with `loss`, or an
            object with `.loss`.

    Returns:
        The loss, a scalar.

    Raises:
        RarefyError: there is none, or it has more than one element.

    Example:
        >>> loss_of((torch.tensor([2.0]), "logits"))
        tensor(2.)
    """
    if isinstance(outputs, Mapping):
        loss = outputs.get("loss")
    # A named tuple with a loss need not begin with it.
    elif isinstance(outputs, list | tuple) and not hasattr(outputs, "loss"):
        loss = outputs[0] if outputs else None
    else:
        loss = outputs if isinstance(outputs, Tensor) else getattr(outputs, "loss", None)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = (
            f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        )
        form = "a scalar loss, (loss, outputs), or an object with .loss (are there labels in the batch?)"
        raise RarefyError(f"the model returned {shape} as its loss; forward must return {form}")
    return loss.reshape(())


def count(batch: Any) -> tuple[int, int | None]:
    """How many samples, and how many tokens if it holds `input_ids`, a batch has.

    Example:
        >>> count({"input_ids": torch.zeros(2, 8)}), count([torch.zeros(4, 3), torch.zeros(4)])
        ((2, 16), (4, None))
    """
    tokens = batch.get("input_ids") if isinstance(batch, Mapping) else None
    first = _first_tensor(batch)
    samples = 1 if first is None or first.ndim == 0 else first.shape[0]
    return samples, tokens.numel() if isinstance(tokens, Tensor) else None


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return next((found for part in parts if (found := _first_tensor(part)) is not None), None)
