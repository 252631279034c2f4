"""What is learnt of a batch at a time, and whether that fits into memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import optim

from rarefy.cost.free_memory import available_bytes
from rarefy.errors import ConfigError
from rarefy.models.call import count
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
