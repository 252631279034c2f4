"""The connections that forward passes use, where they are fewer than the active ones."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class ForwardSet:
    """Keeps the values of some connections aside between optimizer steps, so that forward passes find zeros there.

    The weight itself holds what forward passes use, so nothing that reads it needs a hook: any module, any
    transform and any storage computes with it, and the gradient of the connections aside is what it would be for a
    zero. `show` puts their values back for the optimizer, `hide` takes them aside again.

    Attributes:
        hidden: bool, in the form of the storage's entries: active connections that forward passes do not use; None if
            they use all.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self._aside: Tensor | None = None

    @property
    def is_hiding(self) -> bool:
        """Whether values are kept aside."""
        return self._aside is not None

    @torch.no_grad()
    def hide(self, weight: Tensor) -> None:
        """Takes the values of hidden connections aside."""
        if self.hidden is None or self._aside is not None:
            return
        self.hidden = self.hidden.to(weight.device)
        self._aside = torch.where(self.hidden, weight.data, 0)
        weight.data.masked_fill_(self.hidden, 0)

    @torch.no_grad()
    def show(self, weight: Tensor) -> None:
        """Puts the values back, except where somebody wrote others in the meantime."""
        if self._aside is not None:
            weight.data.copy_(self.true_values(weight))
            self._aside = None

    def true_values(self, weight: Tensor) -> Tensor:
        """The values as the optimizer sees them."""
        if self._aside is None or self.hidden is None:
            return weight.detach()
        aside = self._aside.to(weight)
        return torch.where(self.hidden.to(weight.device) & (weight.detach() == 0), aside, weight.detach())

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Gives what is kept another form, as the storage got one."""
        self.hidden = None if self.hidden is None else change(self.hidden)
        self._aside = None if self._aside is None else change(self._aside)

    def forget(self) -> None:
        """Begins anew with a weight that holds its true values: forward passes use all connections."""
        self.hidden = None
        self._aside = None
