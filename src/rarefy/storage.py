"""How the zeros of one weight are stored: a dense weight and its mask, or the active connections alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import masks
from rarefy.gradients import DenseGradient, LastSelected
from rarefy.nn import SparseLinear, move_entries
from rarefy.optimizer_state import change_state, same_shaped
from rarefy.ranking import Score


class Storage(Protocol):
    """What a `SparseParameter` asks of either storage; the two never know which algorithm runs."""

    @property
    def kind(self) -> str:
        """`masked` or `compact`."""
        ...

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the optimizer trains."""
        ...

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        ...

    @property
    def mask(self) -> Tensor:
        """Bool, the shape of the dense weight, True = active."""
        ...

    @property
    def active(self) -> int:
        """How many connections are active, measured."""
        ...

    @property
    def index_bytes(self) -> int:
        """Memory of the mask or of the indices."""
        ...

    def dense_weight(self) -> Tensor:
        """The dense weight with exact zeros, without gradient; not to be written to."""
        ...

    def keep_top(self, score: Score, count: int) -> Tensor:
        """The mask of the best active connections; see `SparseParameter.keep_top`."""
        ...

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Gives the weight a new topology; see `SparseParameter.set_mask`."""
        ...

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Makes whatever is kept of inactive connections exact zeros."""
        ...

    def select_gradient(self) -> None:
        """Makes the gradient of inactive connections exact zeros, unless they are so since the last time."""
        ...

    @property
    def gradient_is_selected(self) -> bool:
        """Whether no one wrote to the gradient since its zeros were put in place."""
        ...

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """Called once a micro-batch was added to `grad`; `dense` collects the dense gradient if that is wanted."""
        ...

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Called after a state dict was loaded into the module."""
        ...

    def saved_entries(self, tensor: Tensor) -> Tensor:
        """The saved form of a tensor of the shape of `weight`."""
        ...

    def loaded_entries(self, tensor: Tensor) -> Tensor:
        """The reverse: from the dense form, or from the active entries in row-major order."""
        ...


class MaskedStorage:
    """A dense weight with exact zeros, and its mask as the persistent buffer `<leaf>_mask` beside it.

    Both are looked up in the module each time, so they may be moved, converted or loaded at will.
    """

    kind = "masked"

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module, self.leaf = module, leaf
        self.mask_leaf = f"{leaf}_mask"
        self.last_selected = LastSelected()
        mask = torch.ones_like(self.weight, dtype=torch.bool, memory_format=torch.contiguous_format)
        self._write_mask(mask)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return getattr(self.module, self.leaf)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.weight.shape

    @property
    def mask(self) -> Tensor:
        """The mask, bool, of the weight's shape."""
        return getattr(self.module, self.mask_leaf)

    @property
    def active(self) -> int:
        """Counted in the mask."""
        return int(self.mask.count_nonzero())

    @property
    def index_bytes(self) -> int:
        """One byte a position."""
        return self.mask.numel()

    def dense_weight(self) -> Tensor:
        """The weight itself."""
        return self.weight.detach()

    def keep_top(self, score: Score, count: int) -> Tensor:
        """By the score of the whole weight."""
        return masks.drop_lowest(self.mask, score(self.dense_weight()), self.active - count)

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Replaces the mask and zeroes what it drops."""
        self._write_mask(mask)
        self.prune(optimizers)

    def _write_mask(self, mask: Tensor) -> None:
        """A mask of the same place is overwritten in place so that views of it stay valid."""
        if self.mask_leaf in self.module._buffers and self.mask.shape == mask.shape:
            self.mask.copy_(mask)
        else:
            self.module.register_buffer(self.mask_leaf, mask)

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Zeroes weight, gradient and same-shaped optimizer state of inactive connections."""
        weight, mask = self.weight, self.mask
        masks.zero_inactive_(weight.data, mask)
        if weight.grad is not None:
            masks.zero_inactive_(weight.grad, mask)
        for optimizer in optimizers:
            for state in same_shaped(optimizer.state.get(weight), weight.shape):
                masks.zero_inactive_(state, mask)

    def select_gradient(self) -> None:
        """Selects again what somebody wrote to since it was accumulated."""
        grad = self.weight.grad
        if grad is not None and not self.gradient_is_selected:
            masks.zero_inactive_(grad, self.mask)
            self.last_selected.remember(grad)

    @property
    def gradient_is_selected(self) -> bool:
        """True without a gradient to select."""
        grad = self.weight.grad
        return grad is None or grad.layout is not torch.strided or self.last_selected.is_intact(grad)

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """Drops the gradient of inactive connections, once it was added to the dense one."""
        if dense is not None:
            dense.add(grad, self.mask)
        masks.zero_inactive_(grad, self.mask)
        self.last_selected.remember(grad)
        if dense is not None:
            dense.seal(grad)

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Prunes by the mask that was loaded."""
        self.prune(optimizers)

    def saved_entries(self, tensor: Tensor) -> Tensor:
        """The dense tensor as it is."""
        return tensor

    def loaded_entries(self, tensor: Tensor) -> Tensor:
        """Dense."""
        if tensor.dim() != 1 or self.weight.dim() == 1:
            return tensor
        dense = tensor.new_zeros(self.shape)
        dense[self.mask.to(tensor.device)] = tensor
        return dense

    def remove(self) -> None:
        """Leaves the module without a trace of its mask."""
        delattr(self.module, self.mask_leaf)


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

    def keep_top(self, score: Score, count: int) -> Tensor:
        """By the scores of the values alone, unless ties are to be told apart by their places in the weight."""
        scores = score(self.weight.detach())
        kept = masks.keep_top(scores, count)
        if masks.is_unique(kept, scores):
            return self.layer.scatter(kept)
        return masks.drop_lowest(self.mask, self.layer.scatter(scores), self.active - count)

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Moves values, gradient and optimizer state to the new connections."""
        grad, shape = self.weight.grad, self.weight.shape
        sources = self.layer.set_topology(mask)
        if grad is not None:
            self.weight.grad = move_entries(grad, sources)
        change_state(optimizers, self.weight, shape, lambda state: move_entries(state, sources))

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
            change_state(optimizers, self.weight, moved[0], lambda state: move_entries(state, moved[1]))

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


def checksum(mask: Tensor) -> int:
    """A checksum of a mask, by which an optimizer's saved entries know their topology.

    Example:
        >>> checksum(torch.tensor([True, False])) == checksum(torch.tensor([False, True]))
        False
    """
    return zlib.crc32(mask.detach().cpu().contiguous().numpy().tobytes())
