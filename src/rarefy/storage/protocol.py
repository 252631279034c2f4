"""What a `SparseParameter` asks of its storage, whichever it is."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from typing import Literal, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.storage.gradients import DenseGradient
from rarefy.storage.ranking import Score
from rarefy.ties import TieOrder

Kind = Literal["masked", "compact"]

# From what is kept one entry a connection, and the number of a new connection, to the same for another topology.
Carry = Callable[[Tensor, float], Tensor]


class Storage(Protocol):
    """What a `SparseParameter` asks of either storage; the two never know which algorithm runs."""

    @property
    def module(self) -> nn.Module:
        """The one that holds the weight."""
        ...

    @property
    def leaf(self) -> str:
        """Attribute name of the weight."""
        ...

    @property
    def kind(self) -> str:
        """`masked` or `compact`."""
        ...

    @property
    def form(self) -> str:
        """What it is called for people: `masked`, `compact` or `block`."""
        ...

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the optimizer trains."""
        ...

    @property
    def is_in_place(self) -> bool:
        """Whether the module still has the weight as a parameter, with the mask beside it."""
        ...

    @property
    def has_lost_mask(self) -> bool:
        """Whether something else took the place of the mask, so that nothing tells which connections are active."""
        ...

    def check_in_place(self) -> None:
        """Refuses a weight that other code took out of its module; see `SparseParameter.require_parameter`."""
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
    def nonzero(self) -> int:
        """How many positions are active, or hold something that somebody wrote there."""
        ...

    @property
    def fingerprint(self) -> int:
        """A checksum of the mask, the same in every storage."""
        ...

    @property
    def index_bytes(self) -> int:
        """Memory of the mask or of the indices."""
        ...

    @property
    def mask_leaf(self) -> str:
        """Name of the buffer that shows the mask."""
        ...

    @property
    def entries(self) -> Tensor:
        """The numbers that are stored of the weight, to be written in place: all of them, or one a connection."""
        ...

    def dense_weight(self) -> Tensor:
        """The dense weight with exact zeros, without gradient; not to be written to."""
        ...

    def spread(self, entries: Tensor) -> Tensor:
        """A tensor of the form of `entries`, one entry a connection, in the shape of the dense weight."""
        ...

    def collect(self, dense: Tensor) -> Tensor:
        """The reverse: the entries at the active connections, in the form of `entries`."""
        ...

    def keep_top(self, score: Score, count: int, order: TieOrder) -> Tensor:
        """The mask of the best active connections; see `SparseParameter.keep_top`."""
        ...

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> Carry:
        """Gives the weight a new topology; see `SparseParameter.set_mask`.

        Returns:
            What carries other entries of the weight to that topology.
        """
        ...

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Makes whatever is kept of inactive connections exact zeros."""
        ...

    def restore_zeros(self, optimizers: Iterable[Optimizer]) -> bool:
        """Prunes if somebody wrote to inactive positions of the weight; whether it is known that somebody did."""
        ...

    def select_gradient(self, dense: DenseGradient | None) -> None:
        """Makes the gradient of inactive connections exact zeros, unless they are so since the last time.

        Args:
            dense: takes in the whole of a gradient that no backward pass accumulated, if that is wanted.
        """
        ...

    @property
    def gradient_is_selected(self) -> bool:
        """Whether no one wrote to the gradient since its zeros were put in place."""
        ...

    def own_gradient(self) -> None:
        """Copies a gradient that somebody assigned, and may hold or assign elsewhere, before zeros are put in place."""
        ...

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """Called once a micro-batch was added to `grad`; `dense` collects the dense gradient if that is wanted."""
        ...

    def carried_gradient(self, grad: Tensor) -> Tensor | None:
        """What of a gradient that was there before the dense one was collected `after_accumulation` will not see."""
        ...

    def gradient_entries(self) -> Tensor:
        """The gradient of active connections; see `SparseParameter.gradient_entries`."""
        ...

    def set_gradient_entries(self, entries: Tensor) -> None:
        """The reverse; see `SparseParameter.set_gradient_entries`."""
        ...

    def want_dense_gradient(self, dense: DenseGradient | None) -> None:
        """Has backward passes compute the dense gradient and give it to `dense`, where that must be said before."""
        ...

    def take_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Called before a state dict with this mask is loaded into the module."""
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


def checksum(mask: Tensor) -> int:
    """A checksum of a mask, by which an optimizer's saved entries know their topology.

    Example:
        >>> checksum(torch.tensor([True, False])) == checksum(torch.tensor([False, True]))
        False
    """
    # In row-major order, whichever way the mask lies in memory.
    return zlib.crc32(mask.detach().cpu().contiguous().numpy().data)
