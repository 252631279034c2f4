"""Compact storage: the active connections of a linear layer alone."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import masks
from rarefy.nn import SparseLinear, move_entries
from rarefy.storage.gradients import DenseGradient
from rarefy.storage.optimizer_state import change_state
from rarefy.storage.ranking import Score
from rarefy.ties import TieOrder


class CompactStorage:
    """Values and indices in a `SparseLinear`: nothing exists of inactive connections, so there is nothing to zero."""

    kind = "compact"

    def __init__(self, layer: SparseLinear) -> None:
        self.layer = layer

    @property
    def weight(self) -> nn.Parameter:
        """The values, [active connections]."""
        return self.layer.values

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return torch.Size(self.layer.weight_shape)

    @property
    def mask(self) -> Tensor:
        """Built from the indices."""
        return self.layer.weight_mask

    @property
    def active(self) -> int:
        """The number of values."""
        return self.weight.numel()

    @property
    def index_bytes(self) -> int:
        """Of both structures, of the weight and of its transpose."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.layer.csr.tensors)

    def dense_weight(self) -> Tensor:
        """Built from values and indices."""
        return self.layer.weight.detach()

    def spread(self, entries: Tensor) -> Tensor:
        """Scattered."""
        return self.layer.scatter(entries)

    def collect(self, dense: Tensor) -> Tensor:
        """Gathered."""
        return self.layer.gather(dense)

    def keep_top(self, score: Score, count: int, order: TieOrder) -> Tensor:
        """By the scores of the values alone, unless ties are to be told apart by their places in the weight."""
        scores = score(self.weight.detach())
        kept = masks.keep_top(scores, count)
        if masks.is_unique(kept, scores):
            return self.layer.scatter(kept)
        return masks.drop_lowest(self.mask, self.layer.scatter(scores), self.active - count, order)

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Moves values, gradient and optimizer state to the new connections."""
        grad, shape = self.weight.grad, self.weight.shape
        sources = self.layer.set_topology(mask)
        if grad is not None:
            self.weight.grad = move_entries(grad, sources)
        change_state(optimizers, self.weight, shape, lambda state: move_entries(state, sources), begins=True)

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Nothing to do."""

    def select_gradient(self) -> None:
        """Nothing to do."""

    gradient_is_selected = True

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """The dense gradient comes through the layer's probe."""
        if dense is not None and self.layer.wants_dense_gradient:
            dense.pair()
            dense.seal(grad)

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Moves the optimizer state to the connections that were loaded."""
        moved = self.layer.take_moved()
        if moved is not None:
            change_state(
                optimizers, self.weight, moved[0], lambda state: move_entries(state, moved[1]), begins=True
            )

    def saved_entries(self, tensor: Tensor) -> Tensor:
        """The active entries in row-major order, which does not depend on the machine."""
        return self.layer.scatter(tensor.detach())[self.mask]

    def loaded_entries(self, tensor: Tensor) -> Tensor:
        """In the order of `values`."""
        mask = self.mask
        if tensor.shape != mask.shape:
            dense = tensor.new_zeros(mask.shape)
            dense[mask.to(tensor.device)] = tensor
            tensor = dense
        return self.layer.gather(tensor.to(mask.device))
