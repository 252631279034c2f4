"""Floating-point operations of training so far, and those that the dense twin would have needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.training_cost import PER_POSITION, PRODUCTS, Cost, step_operations, used_by
from rarefy.callbacks.flops import ForwardFlops, is_compiled, with_unseen
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.distributed import ranks

Shapes = tuple[Any, ...]
MOST_FORMS = 256


@dataclass(frozen=True)
class ForwardPass:
    """What one forward pass over a batch of one form takes, every weight dense.

    Args:
        weights: operations by name of the weight.
        other: operations between activations.
    """

    weights: Mapping[str, int]
    other: int


class TrainingFlops:
    """Adds up what each training step needs; backward passes count twice the forward pass.

    sparse = Σ over weights of forward · (used + used + active) / size, where active is all positions in steps that
    collect the dense gradient, + two operations a position at each update; products between activations as in the
    dense twin.

    A forward pass is watched once for each form of its batch. The connections are counted after updates only.

    Attributes:
        total: of all processes, since the beginning of the run; None where nothing can be counted.
    """

    def __init__(self) -> None:
        self.total: Cost | None = None
        self._passes: dict[Shapes, ForwardPass] = {}
        self._connections: dict[str, tuple[int, int, int]] = {}
        self._watching = ExitStack()
        self._flops: ForwardFlops | None = None

    def begin(self, trainer: TrainerView) -> None:
        """Begins with a model, whose connections may be others than at the last step that was seen."""
        self.close()
        self._passes = {}
        self._connections = {}
        if is_compiled(trainer.model):
            self.total = None
        elif trainer.global_step == 0:
            self.total = Cost()

    def before_forward(self, trainer: TrainerView, batch: Any) -> None:
        """Watches a forward pass over a batch of a form that was not seen yet."""
        if self.total is not None and trainer.model.training and _shapes(batch) not in self._passes:
            self._flops = self._watching.enter_context(ForwardFlops(trainer.model))

    def after_forward(
        self, trainer: TrainerView, algorithms: Sequence[SparsityAlgorithm], batch: Any
    ) -> None:
        """Counts a forward pass and the backward pass that follows."""
        if self._flops is not None:
            flops = self._flops
            self.close()
            sizes = {name: one.shape.numel() for leaf in algorithms for name, one in leaf.parameters.items()}
            weights = with_unseen(flops.by_parameter, sizes, batch)
            # Texts of any length would fill the memory with forms that never come again.
            if len(self._passes) >= MOST_FORMS:
                self._passes.clear()
            self._passes[_shapes(batch)] = ForwardPass(weights, flops.other)
        if self.total is not None and trainer.model.training:
            self.total += self._cost(self._passes[_shapes(batch)], algorithms)

    def updated(self, name: str, size: int) -> None:
        """Counts the update of a weight, whose connections are others now."""
        self._connections.pop(name, None)
        if self.total is not None:
            self.total += Cost(PER_POSITION * size * ranks(), 0)

    def close(self) -> None:
        """Stops watching; a forward pass that failed has left it on."""
        self._watching.close()
        self._flops = None

    def saved(self) -> dict[str, int] | None:
        """For a checkpoint."""
        return None if self.total is None else {"sparse": self.total.sparse, "dense": self.total.dense}

    def load(self, saved: Mapping[str, int] | None) -> None:
        """Goes on from what `saved` returned; a checkpoint without it has not counted what came before."""
        self.total = None if saved is None else Cost(saved["sparse"], saved["dense"])

    def _cost(self, one: ForwardPass, algorithms: Sequence[SparsityAlgorithm]) -> Cost:
        dense = PRODUCTS * (sum(one.weights.values()) + one.other)
        saved = 0
        for leaf in algorithms:
            is_collected = collects_dense_gradient(leaf)
            for name in leaf.parameters:
                size, used, active = self._counted(leaf, name)
                forward = one.weights.get(name, 0)
                needed = step_operations(forward, size, used, size if is_collected else active)
                saved += PRODUCTS * forward - needed
        return Cost((dense - saved) * ranks(), dense * ranks())

    def _counted(self, leaf: SparsityAlgorithm, name: str) -> tuple[int, int, int]:
        """Positions, connections that forward passes use, and active ones."""
        if name not in self._connections:
            parameter = leaf.parameters[name]
            self._connections[name] = (parameter.shape.numel(), used_by(parameter), parameter.active)
        return self._connections[name]


def collects_dense_gradient(algorithm: SparsityAlgorithm) -> bool:
    """Whether the step in progress collects the dense gradient.

    Args:
        algorithm: applied to a model.
    """
    is_update = not algorithm.autoupdate or algorithm.update_schedule(algorithm.step + 1)
    return algorithm.needs == "dense" and is_update


def _shapes(batch: Any) -> Shapes:
    """The form of a batch: the shapes of its tensors, in order."""
    if isinstance(batch, Tensor):
        return tuple(batch.shape)
    parts = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, list | tuple) else ()
    return tuple(_shapes(part) for part in parts)
