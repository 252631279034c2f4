"""What is remembered of a sparse weight's gradient: the dense sum before an update, and which one was selected."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy import masks
from rarefy.distributed.merged import Exchange, largest_means
from rarefy.errors import RarefyError
from rarefy.storage.ranking import Score
from rarefy.ties import DEFAULT_ORDER, TieOrder
from rarefy.torch_private import times_written


@dataclass(frozen=True)
class Shortlist:
    """The part of a dense gradient that growing connections can need.

    In each balanced group these are all entries from some score upwards, active ones too, with at least as many
    inactive ones as may be grown: whatever ranks below will not be grown, not even if it was just dropped.

    Args:
        places: the listed positions of the flattened weight, rising.
        entries: the gradient there.
        counts: for each balanced group, how many connections may be grown.

    Example:
        >>> grad = torch.tensor([[3.0, 0.0], [1.0, 2.0]])
        >>> Shortlist.of(grad, grad >= 2, [1]).dense(grad.shape)
        tensor([[3., nan],
                [nan, 2.]])
    """

    places: Tensor
    entries: Tensor
    counts: Sequence[int]

    @classmethod
    def of(cls, grad: Tensor, listed: Tensor, counts: Sequence[int]) -> Shortlist:
        """The shortlist of a dense gradient.

        Args:
            grad: the whole gradient.
            listed: bool, what to list; see `ranking.highest_entries`.
            counts: how many may be grown.
        """
        places = listed.flatten().nonzero().squeeze(1)
        entries = grad.flatten()[places]
        # Half the memory of int64, and memory is what the list is for.
        return cls(places.int() if grad.numel() <= 2**31 else places, entries, counts)

    @classmethod
    def merged(cls, own: Tensor, candidates: Tensor, count: int, exchange: Exchange) -> Shortlist:
        """The shortlist of a mean over processes, by size.

        Args:
            own: the dense gradient of this process.
            candidates: bool, of what may be grown; the same in all processes.
            count: how many may be.
            exchange: with the others.
        """
        among = candidates.flatten().nonzero().squeeze(1)
        places, means = largest_means(own.flatten()[among], count, exchange)
        return cls(among[places], means, [count])

    @staticmethod
    def is_smaller(grad: Tensor, listed: int) -> bool:
        """Whether a list of so many positions takes less memory than `grad`."""
        return listed * (grad.element_size() + torch.int32.itemsize) < grad.numel() * grad.element_size()

    def covers(self, counts: Sequence[int]) -> bool:
        """Whether these numbers of connections can be grown from it."""
        return all(needed <= listed for needed, listed in zip(counts, self.counts, strict=True))

    def grow(self, kept: Tensor, count: int, score: Score, order: TieOrder = DEFAULT_ORDER) -> Tensor:
        """What `masks.grow_highest` makes of `kept` by the scores of the gradient; for a weight without groups.

        Args:
            kept: bool, the active connections; those that were dropped before are not.
            count: how many to grow; covered by the list.
            score: ranks every entry by itself.
            order: decides among equal scores.
        """
        grown = kept.flatten().clone()
        places = self.places.long()
        grown[places] = masks.grow_highest(grown[places], score(self.entries), count, order.among(places))
        return grown.view(kept.shape)

    def dense(self, shape: torch.Size) -> Tensor:
        """As a dense gradient, NaN where nothing is listed: that ranks last, as those positions do."""
        dense = self.entries.new_full(shape, torch.nan)
        dense.view(-1)[self.places.long()] = self.entries
        return dense


class DenseGradient:
    """The gradient at every position, summed over the micro-batches of one optimizer step.

    Masked storage adds what was accumulated (`add`). Compact storage adds what its layer's probe receives (`arrive`),
    which may come before or after `pair` of the same backward pass.

    Attributes:
        value: the sum so far, or what is left of it.
        shorten: what arrived in whole -> what has to be kept of it; None to keep everything.
    """

    def __init__(self) -> None:
        self.value: Tensor | Shortlist | None = None
        self.shorten: Callable[[Tensor], Tensor | Shortlist] | None = None
        self._version = -1
        self._arrived: Tensor | None = None
        self._carried: Tensor | None = None
        self._is_expected = False
        self._is_closed = False
        self._is_in_use = False

    def begin(
        self,
        grad: Tensor | None,
        factor_since: Callable[[Tensor], float] = lambda grad: 1.0,
        carried: Callable[[Tensor], Tensor | None] = lambda grad: None,
    ) -> None:
        """Called before a micro-batch is added to `grad`: does to the sum what was done to the gradient.

        Args:
            grad: what the user has left of it; None, or zeros, if he discarded it.
            factor_since: by what it was multiplied since the last micro-batch; 0 where it was zeroed.
            carried: of a gradient that was there before anything was collected, what `add` will not see.
        """
        if self._is_in_use:
            # The optimizer that was about to use the sum raised an error.
            self.reopen()
        if self._is_closed:
            return
        # `zero_grad(set_to_none=False)` leaves the tensor and fills it with zeros.
        if grad is None or (times_written(grad) != self._version and not grad.any()):
            self.value = None
            self._carried = None
        elif self.value is None:
            self._carried = carried(grad)
        else:
            self.scale(factor_since(grad))

    def add(self, grad: Tensor, mask: Tensor) -> None:
        """Takes in `grad`, to which one more micro-batch was just added.

        Inactive positions hold this micro-batch alone (earlier ones were zeroed), active ones the whole sum.
        """
        if self._is_closed:
            return
        value = self._sum
        self.value = grad.detach().clone() if value is None else torch.where(mask, grad, value + grad)

    def arrive(self, grad: Tensor) -> None:
        """Takes in the dense gradient of one micro-batch."""
        if self._is_closed:
            return
        if self._is_expected:
            self._is_expected = False
            self._sum_up(grad)
        else:
            self._arrived = grad

    def pair(self) -> None:
        """Called once a micro-batch was added whose dense gradient arrives, or has arrived."""
        if self._is_closed:
            return
        arrived = self._arrived
        self._arrived = None
        self._is_expected = arrived is None
        if arrived is not None:
            self._sum_up(arrived)

    def claim(self, is_of: Callable[[Tensor], bool]) -> None:
        """Takes in what arrived without being accumulated, as `torch.autograd.grad` leaves it.

        Args:
            is_of: whether the gradient that the optimizer is about to use was made of a dense one.
        """
        arrived = self._arrived
        if self.value is None and not self._is_closed and arrived is not None and is_of(arrived):
            self._arrived = None
            self._sum_up(arrived)

    def assign(self, grad: Tensor) -> None:
        """Takes over a whole gradient that somebody else computed, in place of any sum."""
        self.value = grad.detach().clone()

    def scale(self, factor: float | Tensor) -> None:
        """Multiplies the sum; a shortlist is only ranked, and left as it is."""
        if isinstance(self.value, Tensor) and factor != 1:
            # Not by multiplication, which leaves NaN of what is infinite.
            self.value = self.value * factor if factor else torch.zeros_like(self.value)

    def close(self) -> None:
        """Called when the optimizer is about to use the gradient: what other losses leave there later is not added."""
        self._is_closed = self.value is not None
        self._is_in_use = True

    def used(self) -> None:
        """Called when the optimizer is done with the gradient; not after an error."""
        self._is_in_use = False

    def discard(self) -> None:
        """Called when the optimizer is about to step without a gradient: what was collected belongs to no step."""
        if not self._is_closed or self._is_in_use:
            self.take()

    def reopen(self) -> None:
        """Called when the step of all weights is over."""
        self._is_closed = False
        self._is_in_use = False

    @property
    def is_missing(self) -> bool:
        """Whether a micro-batch was added whose dense gradient never arrived."""
        return self._is_expected

    def seal(self, grad: Tensor) -> None:
        """Called once `grad` was masked: any later write that is no micro-batch shows in its version."""
        self._version = times_written(grad)

    def take(self) -> Tensor | Shortlist | None:
        """The sum, which is forgotten; None if no gradient came."""
        value = self.value
        self.value = None
        self._arrived = None
        self._carried = None
        self._is_expected = False
        self.reopen()
        return value

    def saved(self) -> Any:
        """A copy of the sum for a state dict: a tensor, a shortlist's parts by name, or None."""
        if isinstance(self.value, Shortlist):
            places = self.value.places.clone()
            entries = self.value.entries.clone()
            return {"places": places, "entries": entries, "counts": list(self.value.counts)}
        return None if self.value is None else self.value.clone()

    def load(self, saved: Any, device: torch.device) -> None:
        """Goes on from what `saved` returned, which is copied."""
        self.take()
        if isinstance(saved, dict):
            places, entries = (saved[key].clone().to(device) for key in ("places", "entries"))
            self.value = Shortlist(places, entries, saved["counts"])
        else:
            self.value = None if saved is None else saved.clone().to(device)

    @property
    def _sum(self) -> Tensor | None:
        """The sum, to which a micro-batch is to be added."""
        if isinstance(self.value, Shortlist):
            raise RarefyError(
                "a second backward pass before the optimizer's step is not allowed with accumulates = False; "
                "set accumulates = True on the sparsity algorithm or group"
            )
        return self.value

    def _sum_up(self, grad: Tensor) -> None:
        before = self._carried if self._sum is None else self._sum
        self._carried = None
        total = grad if before is None else before.add_(grad)
        self.value = total if self.shorten is None else self.shorten(total)


class LastSelected:
    """The gradient whose zeros were put in place last; it is not kept alive, and a copy starts without one."""

    def __init__(self) -> None:
        self._grad: weakref.ref[Tensor] | None = None
        self._version = -1

    def __reduce__(self) -> tuple[type[LastSelected], tuple[()]]:
        return LastSelected, ()

    def remember(self, grad: Tensor) -> None:
        """Called once `grad` was selected."""
        self._grad = weakref.ref(grad)
        self._version = times_written(grad)

    def is_of(self, grad: Tensor) -> bool:
        """Whether `grad` is the very tensor that was selected last, written to or not."""
        return self._grad is not None and self._grad() is grad

    def is_intact(self, grad: Tensor) -> bool:
        """Whether `grad` was selected and no one (clipping, noise, an assignment) wrote to it since."""
        return self._grad is not None and self._grad() is grad and self._version == times_written(grad)


def refuse_layout(name: str, grad: Tensor) -> None:
    """Refuses a gradient in one of torch's sparse layouts, whose zeros nobody could put in place.

    Args:
        name: of the weight.
        grad: of it.

    Raises:
        RarefyError: it is.

    Example:
        >>> refuse_layout("0.weight", torch.ones(2, 2))
    """
    if grad.layout is not torch.strided:
        raise RarefyError(
            f"{name} has a sparse gradient; build its module with sparse=False, or assign grad.to_dense()"
        )


class ActivePlaces:
    """The flat positions of a mask's active connections, found once a topology.

    Finding them takes ten times longer than reading a gradient there.

    Example:
        >>> places = ActivePlaces()
        >>> places.of(torch.tensor([[True, False], [True, True]]))
        tensor([0, 2, 3])
    """

    def __init__(self) -> None:
        self._places: Tensor | None = None

    def __reduce__(self) -> tuple[type[ActivePlaces], tuple[()]]:
        return ActivePlaces, ()

    def of(self, mask: Tensor) -> Tensor:
        """Int64, rising, in row-major order of the mask, whichever way that lies in memory."""
        flat = mask.flatten()
        places = self._places
        # Whoever wrote to the mask: as many active ones, and all of these are active.
        if places is None or places.device != mask.device or not _are_places_of(places, flat):
            places = flat.nonzero().squeeze(1)
            # Half the memory, which stays; what is made of it goes.
            self._places = places.int() if flat.numel() <= 2**31 else places
            return places
        return places.long()


def _are_places_of(places: Tensor, flat: Tensor) -> bool:
    if places.numel() != int(flat.count_nonzero()):
        return False
    # They rise: the last one tells whether all are positions of this mask.
    return not places.numel() or (int(places[-1]) < flat.numel() and bool(flat[places].all()))
