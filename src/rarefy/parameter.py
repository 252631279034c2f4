"""One sparse weight: its mask, its storage, and the optimizer state that follows its connections."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import masks
from rarefy.filters import Candidate
from rarefy.patterns import Pattern


class MaskedStorage:
    """A dense weight with exact zeros, and its mask as the persistent buffer `<leaf>_mask` beside it.

    Both are looked up in the module each time, so they may be moved, converted or loaded at will.
    """

    kind = "masked"

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module, self.leaf = module, leaf
        self.mask_leaf = f"{leaf}_mask"
        self.set_mask(torch.ones_like(self.weight, dtype=torch.bool, memory_format=torch.contiguous_format))

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        return getattr(self.module, self.leaf)

    @property
    def mask(self) -> Tensor:
        """The mask, bool, of the weight's shape."""
        return getattr(self.module, self.mask_leaf)

    def set_mask(self, mask: Tensor) -> None:
        """Replaces the mask; a mask of the same place is overwritten in place so that views of it stay valid."""
        if self.mask_leaf in self.module._buffers and self.mask.shape == mask.shape:
            self.mask.copy_(mask)
        else:
            self.module.register_buffer(self.mask_leaf, mask)

    def prune(self) -> None:
        """Makes inactive weights exact zeros."""
        masks.zero_inactive_(self.weight.data, self.mask)

    def remove(self) -> None:
        """Leaves the module without a trace of its mask."""
        delattr(self.module, self.mask_leaf)


class SparseParameter:
    """A weight that is sparse, whichever way it is stored.

    Args:
        candidate: the parameter and the modules that hold it.
        pattern: the structure that its masks obey.

    Attributes:
        steps: how many optimizer steps the weight has taken since the algorithm's step 0.

    Raises:
        ConfigError: the pattern does not fit the weight's shape.
    """

    def __init__(self, candidate: Candidate, pattern: Pattern) -> None:
        pattern.check(candidate.name, candidate.parameter.shape)
        self.name, self.places, self.pattern = candidate.name, candidate.places, pattern
        first = candidate.places[0]
        self.storage = MaskedStorage(first.module, first.leaf)
        self.dense_gradient = DenseGradient()
        self.last_selected = LastSelected()
        self.steps = 0

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the optimizer trains."""
        return self.storage.weight

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the weight's shape, True = active."""
        return self.storage.mask

    @property
    def actual_sparsity(self) -> float:
        """The sparsity measured from the mask."""
        return masks.sparsity_of(self.mask)

    def set_mask(self, mask: Tensor, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Gives the weight a new topology.

        Connections that stay keep weight and optimizer state; dropped ones lose both; new ones start at zero.

        Args:
            mask: bool, shape of the weight.
            optimizers: those whose state follows the connections.
        """
        self.storage.set_mask(mask)
        self.prune(optimizers)

    def select_gradient(self) -> None:
        """Makes the gradient of inactive connections exact zeros, unless they are so since the last time."""
        grad = self.weight.grad
        if grad is not None and grad.layout is torch.strided and not self.last_selected.is_intact(grad):
            masks.zero_inactive_(grad, self.mask)
            self.last_selected.remember(grad)

    def prune(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Makes weight, gradient and same-shaped optimizer state of inactive connections exact zeros."""
        self.storage.prune()
        if self.weight.grad is not None:
            masks.zero_inactive_(self.weight.grad, self.mask)
        for optimizer in optimizers:
            for state in _same_shaped(optimizer.state.get(self.weight), self.weight.shape):
                masks.zero_inactive_(state, self.mask)


def _same_shaped(state: Any, shape: torch.Size) -> Iterator[Tensor]:
    """Every tensor of `shape` in an optimizer's nested state of one parameter."""
    if isinstance(state, Tensor):
        if state.shape == shape:
            yield state
    elif isinstance(state, dict):
        for value in state.values():
            yield from _same_shaped(value, shape)
    elif isinstance(state, list | tuple):
        for value in state:
            yield from _same_shaped(value, shape)


class DenseGradient:
    """The gradient at every position, summed over the micro-batches of one optimizer step."""

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._version = -1

    def begin(self, grad: Tensor | None) -> None:
        """Called before a micro-batch is added to `grad`: forgets the sum if the user discarded that gradient."""
        if grad is None or (grad._version != self._version and not grad.any()):
            self.value = None

    def add(self, grad: Tensor, mask: Tensor) -> None:
        """Takes in `grad`, to which one more micro-batch was just added.

        Inactive positions hold this micro-batch alone (earlier ones were zeroed), active ones the whole sum.
        """
        value = self.value
        self.value = grad.detach().clone() if value is None else torch.where(mask, grad, value + grad)

    def seal(self, grad: Tensor) -> None:
        """Called once `grad` was masked: any later write that is no micro-batch shows in its version."""
        self._version = grad._version

    def take(self) -> Tensor | None:
        """The sum, which is forgotten; None if no gradient came."""
        value, self.value = self.value, None
        return value


class LastSelected:
    """The gradient whose zeros were put in place last; it is not kept alive, and a copy starts without one."""

    def __init__(self) -> None:
        self._grad: weakref.ref[Tensor] | None = None
        self._version = -1

    def __reduce__(self) -> tuple[type[LastSelected], tuple[()]]:
        return LastSelected, ()

    def remember(self, grad: Tensor) -> None:
        """Called once `grad` was selected."""
        self._grad, self._version = weakref.ref(grad), grad._version

    def is_intact(self, grad: Tensor) -> bool:
        """Whether `grad` was selected and no one (clipping, noise, an assignment) wrote to it since."""
        return self._grad is not None and self._grad() is grad and self._version == grad._version
