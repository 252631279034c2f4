"""In which order the layers of a model are pruned, and what each of them is given meanwhile."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.saliency.inputs import watched
from rarefy.saliency.objective import Loss, Objective

See = Callable[[str, nn.Module, Tensor], None]


class _SeenError(Exception):
    """Ends a forward pass once all layers of a stage have been called: what follows is not needed."""


class Walk:
    """Goes through a model stage by stage, in the order in which its layers are called.

    A stage is one entry of the model's list of layers (`layers.3`), or a layer that is in no list. All weights of a
    stage are measured at once, behind stages that are pruned already, so that what has to be held is that of one stage.

    Args:
        model: in evaluation mode.
        modules: the layers by the names of their weights.
        batches: at least one, on the model's device.
        loss: calls the model.

    Raises:
        RarefyError: a layer that the first batch does not call.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any], loss: Loss
    ) -> None:
        self._objective = Objective(model, loss)
        self._loss = loss
        self._batches = batches
        self._modules = modules
        order: list[str] = []
        self._run(batches[0], modules, lambda name, module, x: order.append(name))
        self._calls = Counter(order)
        unseen = next((name for name in modules if name not in self._calls), None)
        if unseen is not None:
            raise RarefyError(
                f"{unseen} is not used by the batches; leave it out of the filter, or give others"
            )
        names = list(dict.fromkeys(order))
        self.stages = [list(group) for _, group in itertools.groupby(names, stage_of)]

    def show(self, stage: Sequence[str], see: See) -> None:
        """Shows the inputs of one stage's layers, for all batches.

        Args:
            stage: names of weights.
            see: called with name, module and input.
        """
        for batch in self._batches:
            self._show_one(batch, stage, see)

    def _show_one(self, batch: Any, stage: Sequence[str], see: See) -> None:
        left = Counter({name: self._calls[name] for name in stage})

        def once(name: str, module: nn.Module, x: Tensor) -> None:
            see(name, module, x)
            left[name] -= 1
            if not any(count > 0 for count in left.values()):
                raise _SeenError

        with suppress(_SeenError):
            self._run(batch, {name: self._modules[name] for name in stage}, once)

    def _run(self, batch: Any, modules: Mapping[str, nn.Module], see: See) -> None:
        with torch.no_grad(), watched(modules, see):
            self._objective.run({}, batch, self._loss)


def stage_of(name: str) -> str:
    """The stage that a weight belongs to.

    Example:
        >>> stage_of("model.layers.3.attn.q.weight"), stage_of("head.weight")
        ('model.layers.3', 'head')
    """
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])
