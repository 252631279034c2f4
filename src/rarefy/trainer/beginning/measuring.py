"""First masks that are measured on the training data, before the first step."""

from __future__ import annotations

import logging
from typing import Any

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.errors import RarefyError
from rarefy.first_masks.kinds import FromData
from rarefy.first_masks.task import given_batches
from rarefy.models.call import to_device
from rarefy.trainer.micro_batches import choose_size, parts_of
from rarefy.trainer.session import Session

log = logging.getLogger("rarefy")


def give_first_masks(session: Session) -> None:
    """Measures the first masks that wait for data, and sets them.

    The batches are the first ones of the first epoch; training begins with the same ones afterwards. A run that goes on
    from a checkpoint has its masks already.

    Args:
        session: its feed holds the training data, and what a checkpoint had for it is loaded.

    Raises:
        RarefyError: the data gives no batch, or a method cannot measure the model.
    """
    algorithms = session.sparsity.algorithms if session.sparsity is not None else []
    waiting = [one for one in algorithms if one.awaiting]
    if not waiting:
        return
    numbers = [_number(one) for one in waiting]
    ahead = session.needed_feed.ahead(max((number for number in numbers if number), default=0))
    # All before any is set, so that each is measured in the dense model.
    first = [one.measured(_batches(session, one, ahead)) for one in waiting]
    for one, masks in zip(waiting, first, strict=True):
        log.info("first masks of %d weights: %s", len(masks), one.init_method)
        one.begin(masks)


def _number(algorithm: SparsityAlgorithm) -> int | None:
    """How many batches of the training data are wanted; None for one's own."""
    batches = _method(algorithm).batches
    return batches if isinstance(batches, int) else None


def _method(algorithm: SparsityAlgorithm) -> FromData:
    assert isinstance(algorithm.init_method, FromData)
    return algorithm.init_method


def _batches(session: Session, algorithm: SparsityAlgorithm, ahead: list[Any]) -> list[list[Any]]:
    number = _number(algorithm)
    if number is None:
        return given_batches(_method(algorithm).batches, session.device)
    if len(ahead) < number:
        log.warning("init_method: an epoch has %d batches, fewer than batches: %d", len(ahead), number)
    if not ahead:
        raise RarefyError("the training data gave no batch to measure first masks on; give more data")
    return [_parts(session, batch) for batch in ahead[:number]]


def _parts(session: Session, batch: Any) -> list[Any]:
    """A batch as training would learn it: checked, on the device, in parts if it does not fit whole."""
    session.forward.check(batch)
    if session.micro_batch_size is None and session.loop.micro_batch_size is not None:
        choose_size(session, batch)
    return [to_device(part, session.device) for part in parts_of(session, batch)]
