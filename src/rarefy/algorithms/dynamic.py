"""Algorithms whose topology changes while the model trains."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.distributed import mean_over_ranks, ranks
from rarefy.errors import RarefyError
from rarefy.initializers import check_mask, generator_for
from rarefy.schedules import parse_update_schedule
from rarefy.storage.gradients import Shortlist
from rarefy.storage.parameter import SparseParameter
from rarefy.ties import TieOrder


class DynamicSparsityAlgorithm(SparsityAlgorithm):
    """A base for algorithms of one's own: implement `update_mask`.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        update: update schedule, `{freq, start, stop}`, `{steps: [...]}` or a function; None for every step.
        **options: the options of `SparsityAlgorithm`.

    Attributes:
        needs_dense_grad: set it to True in a subclass that ranks by the dense gradient.
        generator: a CPU generator, fresh for every parameter and update; the source of all randomness.

    Example:
        >>> class KeepLarge(DynamicSparsityAlgorithm):
        ...     '''Keeps the largest weights.'''
        ...     def update_mask(self, weight, mask, sparsity, dense_grad):
        ...         return self.keep_top(weight.abs(), sparsity)
        >>> layer = torch.nn.Linear(10, 10)
        >>> KeepLarge(0.9).apply(layer)
        >>> int(layer.weight_mask.sum())
        10
    """

    dynamic: ClassVar[bool] = True

    def __init__(self, sparsity: Any, *, update: Any = None, **options: Any) -> None:
        super().__init__(sparsity, **options)
        self.update_schedule = parse_update_schedule(update)
        self.generator = torch.Generator()

    @abstractmethod
    def update_mask(self, weight: Tensor, mask: Tensor, sparsity: float, dense_grad: Tensor | None) -> Tensor:
        """The new mask of one weight, or of one of its balanced groups.

        Args:
            weight: dense, with exact zeros; any shape. Do not change it.
            mask: bool, the shape of `weight`, True = active.
            sparsity: target for this weight, in [0, 1].
            dense_grad: mean gradient at every position, if `needs_dense_grad`; else None.

        Returns:
            Bool tensor of the shape of `weight`.
        """

    def keep_top(self, scores: Tensor, sparsity: float) -> Tensor:
        """The mask of the highest scores at a sparsity, which obeys the `pattern` of this algorithm.

        Equal scores are told apart by an order that belongs to the seed, the parameter and the update.

        Args:
            scores: the shape of the weight that `update_mask` was given; higher = keep.
            sparsity: fraction of inactive connections, in [0, 1].

        Returns:
            Bool tensor of the shape of `scores`.
        """
        return self.pattern.structure.keep_top(scores, sparsity, TieOrder.of(self.generator))

    @torch.no_grad()
    def update(self) -> None:
        """Recomputes the topology of every parameter now.

        Raises:
            RarefyError: a backward pass left the dense gradient out that the algorithm ranks by.
        """
        targets = self._targets({name: parameter.shape for name, parameter in self.parameters.items()})
        for name, parameter in self.parameters.items():
            self._update_parameter(parameter, targets[name])
        self.updates += 1

    def _update_parameter(self, parameter: SparseParameter, sparsity: float) -> None:
        self.generator = generator_for(self.seed or 0, parameter.name, self.updates)
        mask = self._next_mask(parameter, sparsity)
        if mask is not None:
            self._set_mask(parameter, mask)

    def _next_mask(self, parameter: SparseParameter, sparsity: float) -> Tensor | None:
        """The new mask of a parameter, by `update_mask`; None where the gradient for it is missing."""
        weight, dense_grad = parameter.dense_weight(), self._dense_gradient(parameter)
        if self.needs_dense_grad and dense_grad is None:
            return None
        if isinstance(dense_grad, Shortlist):
            dense_grad = dense_grad.dense(parameter.shape)
        split = parameter.pattern.split
        weights, old_masks = split(weight), split(parameter.mask)
        grads = split(dense_grad) if dense_grad is not None else [None] * len(weights)
        pieces = [
            self._checked(self.update_mask(w, mask, sparsity, grad), w, sparsity)
            for w, mask, grad in zip(weights, old_masks, grads, strict=True)
        ]
        return parameter.pattern.merge(pieces)

    def _checked(self, mask: Tensor, weight: Tensor, sparsity: float) -> Tensor:
        """What `update_mask` returned, if it is a mask that obeys the pattern."""
        source, advice = f"{type(self).__name__}.update_mask", "choose with self.keep_top(scores, sparsity)"
        mask = check_mask(mask, weight, source)
        return self.pattern.structure.require(mask, sparsity, source, advice)

    def _dense_gradient(self, parameter: SparseParameter) -> Tensor | Shortlist | None:
        """The mean dense gradient of this step; None without one (a frozen weight keeps its topology).

        A shortlist is only made in a single process.

        Raises:
            RarefyError: a backward pass left it out.
        """
        if not self.needs_dense_grad:
            return None
        if parameter.dense_gradient.is_missing:
            raise RarefyError(
                f"{parameter.name} has a gradient but no dense gradient, by which {self.name or type(self).__name__} "
                f"updates at step {self.step}: loss.backward(inputs=...) leaves it out in compact storage; call "
                "loss.backward() without inputs, or set compute: masked"
            )
        value = parameter.dense_gradient.take()
        if value is None and ranks() > 1:
            value = torch.zeros_like(parameter.dense_weight())
        return mean_over_ranks(value) if isinstance(value, Tensor) else value
