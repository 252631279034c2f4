"""First masks that are measured on the training data, before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.distributed import failing_together, highest_of_all, whole
from rarefy.errors import RarefyError
from rarefy.first_masks.from_data import FromData
from rarefy.first_masks.task import given_batches
from rarefy.models.call import to_device
from rarefy.trainer.micro_batches import choose_size, parts_of_step
from rarefy.trainer.session import Session

log = logging.getLogger("rarefy")


def give_first_masks(session: Session, waiting: Sequence[SparsityAlgorithm]) -> None:
    """Measures the first masks that wait for data, and sets them.

    The batches are the first ones of the first epoch; training begins with the same ones afterwards. A run that goes on
    from a checkpoint has its masks already.

    Args:
        session: its feed holds the training data, and what a checkpoint had for it is loaded.
        waiting: the algorithms whose masks these are.

    Raises:
        RarefyError: the data gives no batch, or a method cannot measure the model.
    """
    model = _whole_model(session)
    numbers = [_number(one) for one in waiting]
    # Measuring averages over the processes, which must not wait for one whose data failed.
    with failing_together(session.device):
        ahead = _ahead(session, numbers)
        own = [None if number else _given(session, one) for one, number in zip(waiting, numbers, strict=True)]
    # As many in each process, though one may have fewer in its epoch.
    shared = _in_parts(session, ahead[: -highest_of_all(-len(ahead))])
    # All before any is set, so that each is measured in the dense model.
    first = [
        one.measured(*(given or (shared[0][:number], shared[1][:number])), model)
        for one, number, given in zip(waiting, numbers, own, strict=True)
    ]
    for one, masks in zip(waiting, first, strict=True):
        log.info("first masks of %d weights: %s", len(masks), one.init_method)
        one.begin(masks)


def _whole_model(session: Session) -> nn.Module | None:
    """The copy that is measured in the place of a model that was cut, with the weights that a checkpoint brought."""
    copy = session.uncut
    if copy is not None:
        copy.load_state_dict({name: whole(tensor) for name, tensor in session.model.state_dict().items()})
        copy.train()
    return copy


def _number(algorithm: SparsityAlgorithm) -> int | None:
    """How many batches of the training data are wanted; None for one's own."""
    batches = _method(algorithm).batches
    return batches if isinstance(batches, int) else None


def _method(algorithm: SparsityAlgorithm) -> FromData:
    assert isinstance(algorithm.init_method, FromData)
    return algorithm.init_method


def _given(session: Session, algorithm: SparsityAlgorithm) -> tuple[list[list[Any]], None]:
    method = _method(algorithm)
    return given_batches(method.batches, session.device) if method.looks_at_data else [], None


def _ahead(session: Session, numbers: Sequence[int | None]) -> list[Any]:
    """The first batches of the training data, as many as somebody wants, checked by the model."""
    wanted = max((number for number in numbers if number), default=0)
    ahead = session.needed_feed.ahead(wanted)
    if len(ahead) < wanted:
        log.warning("init_method: an epoch has %d batches, fewer than batches: %d", len(ahead), wanted)
    if wanted and not ahead:
        raise RarefyError("the training data gave no batch to measure first masks on; give more data")
    for batch in ahead:
        session.forward.check(batch)
    if ahead and session.micro_batch_size is None and session.loop.micro_batch_size is not None:
        choose_size(session, ahead[0])
    return ahead


def _in_parts(session: Session, batches: list[Any]) -> tuple[list[list[Any]], list[list[float]]]:
    """Batches as training would learn them: on the device, in parts if they do not fit whole; and factors of losses."""
    parts = parts_of_step(session, batches)
    moved = [[to_device(part.batch, session.device) for part in several] for several in parts]
    return moved, [[part.weight for part in several] for several in parts]
