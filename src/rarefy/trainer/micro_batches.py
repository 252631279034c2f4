"""What is learnt of a batch at a time, and whether that fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, optim

from rarefy.cost.free_memory import available_bytes
from rarefy.distributed import mean_over_ranks, ranks
from rarefy.errors import ConfigError
from rarefy.models.call import count
from rarefy.models.language_modeling import SHARE_OF_SAMPLES, WHOLE_NORMALIZER
from rarefy.models.protocol import EstimatesMemory, SplitsBatch
from rarefy.storage.optimizer_state import stored_numbers
from rarefy.storage.optimizer_traits import trained_parameters
from rarefy.trainer.session import Session

log = logging.getLogger("rarefy")

_GIB = 2**30
# The estimate of activations may be a third too low or too high; below this nobody is kept from trying.
_SURELY_TOO_MUCH = 1.3
_STATES = {optim.SGD: 0, optim.RMSprop: 1, optim.Adagrad: 1, optim.Adafactor: 1}


def parts_of(session: Session, batch: Any) -> list[Any]:
    """What is learnt at a time of a batch: all of it, or parts of `micro_batch_size` samples.

    Raises:
        ConfigError: the model does not tell what its loss is divided by, so that parts would not add up.
    """
    size = session.micro_batch_size
    if size is None or count(batch)[0] <= size:
        return [batch]
    model = session.model
    if not isinstance(model, SplitsBatch):
        given = f"{size} for {type(model).__name__}, which has no `parts_of`,"
        raise ConfigError("loop.micro_batch_size", given, "null, or grad_accum_steps with smaller batches")
    return list(model.parts_of(batch, size))


@dataclass(frozen=True)
class Part:
    """What is learnt at a time.

    Args:
        batch: all of a batch, or a part of it.
        weight: a factor of its loss.
    """

    batch: Any
    weight: float = 1.0


def parts_of_step(session: Session, batches: Sequence[Any]) -> list[list[Part]]:
    """The parts of each batch of one optimizer step.

    Several processes have a share of each batch. Its loss is that of the whole batch where the mean over the processes
    is: each part is divided by what the processes have on average, tokens that count where the model tells them, else
    samples.
    """
    if ranks() == 1:
        return [[Part(part) for part in parts_of(session, batch)] for batch in batches]
    parts = [_divided(session, batch) for batch in batches]
    samples = [float(count(batch)[0]) for batch in batches]
    # As long in every process, though one may have fewer batches in its last step.
    own = torch.zeros(max(session.loop.grad_accum_steps, len(batches)), 2, device=session.device)
    for index, (several, number) in enumerate(zip(parts, samples, strict=True)):
        own[index, 0] = number
        own[index, 1] = _normalizer(several[0], number)
    means = mean_over_ranks(own.double()).float()
    return [
        [_share(part, number, mean) for part in several]
        for several, number, mean in zip(parts, samples, means, strict=False)
    ]


def _divided(session: Session, batch: Any) -> list[Any]:
    """As `parts_of`; where there is one part, it too is told what its loss is divided by, if the model tells it."""
    found = parts_of(session, batch)
    if len(found) == 1 and isinstance(session.model, SplitsBatch):
        return list(session.model.parts_of(batch, count(batch)[0]))
    return found


def _normalizer(part: Any, samples: float) -> Any:
    return part.get(WHOLE_NORMALIZER, samples) if isinstance(part, Mapping) else samples


def _share(part: Any, samples: float, mean: Tensor) -> Part:
    """A part of a share of a batch, of which the processes have `mean` samples and tokens on average."""
    more = samples / mean[0].cpu()
    if not isinstance(part, Mapping) or WHOLE_NORMALIZER not in part:
        return Part(part, float(more))
    share = part[SHARE_OF_SAMPLES] * more
    return Part({**part, WHOLE_NORMALIZER: mean[1], SHARE_OF_SAMPLES: share})


@dataclass(frozen=True)
class Needed:
    """Memory that a step takes beside the weights, in bytes.

    Args:
        gradients: of all trained parameters.
        optimizer: its state.
        activations: of one sample; 0 where the model does not tell.
    """

    gradients: int
    optimizer: int
    activations: int

    def of(self, samples: int) -> int:
        """All of it with so many samples at a time."""
        return self.gradients + self.optimizer + samples * self.activations

    def fitting(self, available: int) -> int:
        """How many samples fit at a time; 0 where none does."""
        rest = available - self.gradients - self.optimizer
        return max(0, rest // self.activations) if self.activations else 1


def choose_size(session: Session, batch: Any, available: int | None = None) -> None:
    """Decides before the first step how much of a batch is learnt at a time, and refuses what cannot fit.

    Args:
        session: whose optimizer may have no state yet.
        batch: of the training data.
        available: bytes; None looks at the machine.

    Raises:
        ConfigError: the step needs clearly more memory than there is.
    """
    asked = session.loop.micro_batch_size
    samples = count(batch)[0]
    needed = needed_for(session, batch)
    available = available_bytes(session.device) if available is None else available
    if asked == "auto":
        fitting = samples if available is None else needed.fitting(available)
        asked = samples if fitting >= samples else max(1, power_below(fitting))
        log.info("micro_batch_size: auto takes %d of %d samples at a time", asked, samples)
    session.micro_batch_size = asked
    if available is not None:
        _check(needed, min(asked or samples, samples), samples, available)


def power_below(number: int) -> int:
    """The largest power of two that is not above a number, 0 for 0: the estimate needs room to be wrong.

    Example:
        >>> power_below(11), power_below(0)
        (8, 0)
    """
    return 1 << number.bit_length() >> 1


def _check(needed: Needed, size: int, samples: int, available: int) -> None:
    total = needed.of(size)
    if total <= available:
        return
    what = (
        f"{_in_gib(total)} beside the weights (gradients {_in_gib(needed.gradients)}, optimizer "
        f"{_in_gib(needed.optimizer)}, activations about {_in_gib(size * needed.activations)} for {size} samples)"
    )
    # Fewer than at present, or it would be no advice.
    fitting = power_below(min(needed.fitting(available), size - 1))
    hint = (
        f"loop.micro_batch_size: {fitting} (the same result)" if fitting else "a smaller model or more memory"
    )
    if total <= _SURELY_TOO_MUCH * available:
        log.warning("a step takes %s, and %s is free; it may not fit: %s", what, _in_gib(available), hint)
        return
    given = f"a batch of {samples} samples, which takes {what} where {_in_gib(available)} is free,"
    raise ConfigError("", given, hint)


def _in_gib(size: int) -> str:
    return f"{size / _GIB:.1f} GiB"


def needed_for(session: Session, batch: Any) -> Needed:
    """What a step takes beside the weights that are there."""
    optimizer = session.needed_optimizer
    trained = [one for one in trained_parameters(optimizer) if one.requires_grad]
    # What is there already is no part of the memory that is free.
    numbers = sum(stored_numbers(one) * one.element_size() for one in trained if one.grad is None)
    fresh = sum(stored_numbers(one) * one.element_size() for one in trained if one not in optimizer.state)
    return Needed(numbers, fresh * _copies(optimizer), _activations(session, batch))


def _copies(optimizer: optim.Optimizer) -> int:
    """Numbers of state for each number of a parameter; two where the optimizer is not known."""
    if isinstance(optimizer, optim.SGD) and any(group["momentum"] for group in optimizer.param_groups):
        return 1
    return next((number for kind, number in _STATES.items() if isinstance(optimizer, kind)), 2)


def _activations(session: Session, batch: Any) -> int:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(session.model, EstimatesMemory) or ids is None or ids.dim() != 2:
        return 0
    size = 2 if session.precision.config.enabled else next(session.model.parameters()).element_size()
    return session.model.activation_bytes(1, ids.shape[1], size)
