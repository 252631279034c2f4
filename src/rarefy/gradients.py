"""What is remembered of a sparse weight's gradient: the dense sum before an update, and which one was selected."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class DenseGradient:
    """The gradient at every position, summed over the micro-batches of one optimizer step.

    Masked storage adds what was accumulated (`add`). Compact storage adds what its layer's probe receives (`arrive`),
    which may come before or after `pair` of the same backward pass.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None
        self._version = -1
        self._arrived: Tensor | None = None
        self._is_expected = False

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

    def arrive(self, grad: Tensor) -> None:
        """Takes in the dense gradient of one micro-batch."""
        if self._is_expected:
            self._is_expected = False
            self._sum_up(grad)
        else:
            self._arrived = grad

    def pair(self) -> None:
        """Called once a micro-batch was added whose dense gradient arrives, or has arrived."""
        arrived, self._arrived = self._arrived, None
        self._is_expected = arrived is None
        if arrived is not None:
            self._sum_up(arrived)

    @property
    def is_missing(self) -> bool:
        """Whether a micro-batch was added whose dense gradient never arrived."""
        return self._is_expected

    def seal(self, grad: Tensor) -> None:
        """Called once `grad` was masked: any later write that is no micro-batch shows in its version."""
        self._version = grad._version

    def take(self) -> Tensor | None:
        """The sum, which is forgotten; None if no gradient came."""
        value = self.value
        self.value, self._arrived, self._is_expected = None, None, False
        return value

    def _sum_up(self, grad: Tensor) -> None:
        self.value = grad if self.value is None else self.value.add_(grad)


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
