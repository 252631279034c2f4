"""The mark of a model that is in its form for inference, and the way back."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.torch_private import forward_pre_hooks, remove_hooks


class InferenceOnly:
    """Refuses to train a model whose weights gave up what training needs; one for each model.

    Args:
        frozen: names of the parameters that wanted a gradient before.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> InferenceOnly(["weight"]).mark(model)
        >>> [mark.frozen for mark in marks(model)]
        [('weight',)]
    """

    def __init__(self, frozen: Iterable[str]) -> None:
        self.frozen = tuple(frozen)

    def mark(self, model: nn.Module) -> None:
        """Freezes the parameters and watches the forward passes of the model."""
        for name in self.frozen:
            model.get_parameter(name).requires_grad_(False)
        model.register_forward_pre_hook(self.before_forward)

    def before_forward(self, module: nn.Module, _: Any) -> None:
        """Forward pre-hook.

        Raises:
            RarefyError: the forward pass would belong to a training step.
        """
        if module.training and torch.is_grad_enabled():
            raise RarefyError(
                "a model that rarefy.compact made ready for inference is not trained; call model.eval() for "
                "inference, or rarefy.finalize(model) and apply(model) of an algorithm before training"
            )

    def release(self, model: nn.Module) -> None:
        """Lets the model be trained again."""
        remove_hooks(model, self)
        parameters = dict(model.named_parameters())
        for name in self.frozen:
            if name in parameters:
                parameters[name].requires_grad_(True)


def marks(module: nn.Module) -> list[InferenceOnly]:
    """The marks of exactly this module.

    Example:
        >>> marks(nn.Linear(2, 2))
        []
    """
    owners = (getattr(hook, "__self__", None) for hook in forward_pre_hooks(module).values())
    return [owner for owner in owners if isinstance(owner, InferenceOnly)]
