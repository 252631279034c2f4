"""In which order the layers of a model are pruned, and what each of them is given meanwhile."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.distributed import from_all
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
        RarefyError: a layer that no batch calls, or none of one process.
    """

    def __init__(
        self, model: nn.Module, modules: Mapping[str, nn.Module], batches: Sequence[Any], loss: Loss
    ) -> None:
        self._objective = Objective(model, loss)
        self._loss = loss
        self._batches = batches
        self._modules = modules
        orders = [self._order(batch) for batch in batches]
        self._calls = [Counter(order) for order in orders]
        # All processes prune the same stages, by the first one's order: inputs are summed over them.
        by_rank = from_all(merged(orders))
        unseen = next((name for name in modules for seen in by_rank if name not in seen), None)
        if unseen is not None:
            whose = "the batches" if len(by_rank) == 1 else "the batches of each process"
            raise RarefyError(f"{unseen} is not used by {whose}; leave it out of the filter, or give others")
        names = by_rank[0]
        self.stages = [list(group) for _, group in itertools.groupby(names, stage_of)]

    def show(self, stage: Sequence[str], see: See) -> None:
        """Shows the inputs of one stage's layers, for all batches.

        Args:
            stage: names of weights.
            see: called with name, module and input.
        """
        counts = [{name: calls[name] for name in stage} for calls in self._calls]
        # Where calls depend on the batch, as among experts, they may depend on what is pruned before as well.
        is_steady = all(one == counts[0] for one in counts)
        for batch in self._batches:
            if is_steady:
                self._show_until(batch, Counter(counts[0]), see)
            else:
                self._run(batch, {name: self._modules[name] for name in stage}, see)

    def _show_until(self, batch: Any, left: Counter[str], see: See) -> None:
        """Shows inputs until each layer has been called as often as it says."""

        def once(name: str, module: nn.Module, x: Tensor) -> None:
            see(name, module, x)
            left[name] -= 1
            if not any(count > 0 for count in left.values()):
                raise _SeenError

        with suppress(_SeenError):
            self._run(batch, {name: self._modules[name] for name in left}, once)

    def _order(self, batch: Any) -> list[str]:
        """The layers in the order of their calls, each as often as it is called."""
        order: list[str] = []
        self._run(batch, self._modules, lambda name, module, x: order.append(name))
        return order

    def _run(self, batch: Any, modules: Mapping[str, nn.Module], see: See) -> None:
        with torch.no_grad(), watched(modules.items(), see):
            self._objective.run({}, batch, self._loss)


def merged(orders: Sequence[Sequence[str]]) -> list[str]:
    """One order of all names: that of the first, with what only later ones have behind what precedes it there.

    Example:
        >>> merged([["a", "c", "a"], ["a", "b", "c"]])
        ['a', 'b', 'c']
    """
    whole: list[str] = []
    for order in orders:
        if set(order) <= set(whole):
            continue
        place = 0
        for name in dict.fromkeys(order):
            if name not in whole:
                whole.insert(place, name)
            place = whole.index(name) + 1
    return whole


def stage_of(name: str) -> str:
    """The stage that a weight belongs to.

    Example:
        >>> stage_of("model.layers.3.attn.q.weight"), stage_of("head.weight")
        ('model.layers.3', 'head')
    """
    parts = name.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[:-1] if number is None else parts[: number + 1])
