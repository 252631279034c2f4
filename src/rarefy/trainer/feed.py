"""The training data as an endless stream of optimizer steps, with a position that a checkpoint can hold."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor

from rarefy.checkpoint import rng
from rarefy.data.loader import ResumableLoader
from rarefy.distributed import ranks
from rarefy.errors import RarefyError
from rarefy.torch_private.ddp import end_workers
from rarefy.trainer.signals import signals_held_back

log = logging.getLogger("rarefy")

Loader = Iterable[Any] | Callable[[], Iterable[Any]]


def open_loader(loader: Loader) -> Iterable[Any]:
    """The data itself, from data or from a function that makes it.

    Raises:
        RarefyError: neither, or data without a single batch.

    Example:
        >>> open_loader(lambda: [1, 2])
        [1, 2]
    """
    # What can be iterated is data, even where it can be called as well.
    opened = loader() if callable(loader) and not isinstance(loader, Iterable) else loader
    if not isinstance(opened, Iterable):
        kind = type(opened).__name__
        raise RarefyError(
            f"{kind} is no training or validation data; give a DataLoader, a list, or a function"
        )
    if batches_in(opened) == 0:
        raise RarefyError("the data has no batch; does it hold fewer samples than one batch takes?")
    return opened


def batches_in(data: Any) -> int | None:
    """How many batches one pass over the data gives, if it tells.

    Example:
        >>> batches_in([1, 2]), batches_in(iter([1]))
        (2, None)
    """
    if not isinstance(data, Sized):
        return None
    # A DataLoader of an iterable data set has `__len__`, which then fails.
    try:
        return len(data)
    except TypeError:
        return None


class TrainFeed:
    """Reads the batches of one optimizer step after the other, epoch after epoch.

    A step never spans two epochs: the last one of an epoch takes the batches that are left. Data with
    `set_position` is asked to go to a position; other data gets there by reading and dropping batches, with
    the random generators as they were when that epoch began.

    Args:
        loader: the data, or a function that makes it.
        accumulate: batches per optimizer step.

    Attributes:
        epoch: passes over the data that are over.
        batch: batches of this pass that were read.
    """

    def __init__(self, loader: Loader, accumulate: int = 1) -> None:
        self.data = open_loader(loader)
        self.accumulate = accumulate
        self.epoch = 0
        self.batch = 0
        self._iterator: Iterator[Any] | None = None
        self._at_epoch_start: dict[str, Tensor] = {}

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in one pass over the data, if it tells its length."""
        batches = batches_in(self.data)
        return None if batches is None else math.ceil(batches / self.accumulate)

    @property
    def _processes(self) -> int:
        """How many processes share the data, where the position of one of them depends on that."""
        return getattr(
            self.data, "processes", getattr(getattr(self.data, "sampler", None), "num_replicas", 1)
        )

    def next_step(self) -> list[Any]:
        """The batches of the next optimizer step, at least one.

        Raises:
            RarefyError: a pass over the data gives nothing.
        """
        window = self._read()
        if window:
            return window
        # Only a pass that gave something is over; an iterator used up would count epochs without end.
        if self._iterator is not None and self.batch:
            self.epoch += 1
            self.batch = 0
        self._begin_epoch(0)
        window = self._read()
        if not window:
            hint = "an iterator gives its batches only once; give a DataLoader, a list, or a function"
            raise RarefyError(f"the training data gave no batch in epoch {self.epoch}: {hint}")
        return window

    def give_back(self, window: list[Any]) -> None:
        """Takes the position back to before `window`, the last step's batches; only a checkpoint may follow."""
        self.batch -= len(window)

    def ahead(self, count: int) -> list[Any]:
        """The first batches of the first epoch, which training will get all the same, in the same order.

        Data is iterated once more and random generators are set back; what can be iterated only once is remembered.

        Args:
            count: how many; fewer come where the epoch has no more.
        """
        if count == 0:
            return []
        if isinstance(self.data, Iterator):
            first = list(islice(self.data, count))
            self.data = chain(first, self.data)
            return first
        states = self._capture()
        if isinstance(self.data, ResumableLoader):
            self.data.set_position(0, 0)
        try:
            with signals_held_back():
                iterator = iter(self.data)
            return list(islice(iterator, count))
        finally:
            # Workers that live on would go on with the random numbers that they have reached.
            end_workers(self.data)
            self._restore(states)

    def close(self) -> None:
        """Lets go of the iterator and ends its worker processes, those too that live on from epoch to epoch."""
        self._iterator = None
        end_workers(self.data)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what is needed to get the same epoch again."""
        position = {"epoch": self.epoch, "batch": self.batch, "at_epoch_start": dict(self._at_epoch_start)}
        return {**position, "processes": self._processes}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position; changes the random generators, so restore them afterwards.

        Raises:
            RarefyError: the position is one of another number of processes, on which it depends.
        """
        # Checkpoints from before data was shared do not say it.
        if state.get("processes", self._processes) != self._processes:
            # Data processors once dealt out whole batches, and cannot go on in the middle of that.
            again = (
                "" if isinstance(self.data, ResumableLoader) else f"start {state['processes']} processes, or "
            )
            raise RarefyError(
                f"its position is that of data which {state['processes']} processes shared, batch by batch, and this "
                f"run has {ranks()}; {again}begin anew with --load_checkpoint_states model"
            )
        self.epoch = state["epoch"]
        self._iterator = None
        if state["batch"]:
            # The order of an epoch is drawn when it begins, so the generators go back to that moment.
            self._restore(state["at_epoch_start"])
            self._begin_epoch(state["batch"])
        self.batch = state["batch"]

    def _read(self) -> list[Any]:
        window: list[Any] = []
        while self._iterator is not None and len(window) < self.accumulate:
            try:
                window.append(next(self._iterator))
            except StopIteration:
                break
        self.batch += len(window)
        return window

    def _begin_epoch(self, batch: int) -> None:
        # Before `iter`, which draws the order and the seeds of the workers.
        self._at_epoch_start = self._capture()
        sampler = getattr(self.data, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            # torch's DistributedSampler repeats its order otherwise.
            sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
        if isinstance(self.data, ResumableLoader):
            self.data.set_position(self.epoch, batch)
            batch = 0
        with signals_held_back():
            self._iterator = iter(self.data)
        if batch:
            log.info("reading past the first %d batches of epoch %d", batch, self.epoch)
        for _ in range(batch):
            # Data that has become shorter ends the epoch here, which is not an error.
            next(self._iterator, None)

    def _capture(self) -> dict[str, Tensor]:
        own = {
            f"loader.{index}": generator.get_state() for index, generator in enumerate(_generators(self.data))
        }
        return {**rng.capture(), **own}

    def _restore(self, states: dict[str, Tensor]) -> None:
        rng.restore(states)
        for index, generator in enumerate(_generators(self.data)):
            if f"loader.{index}" in states:
                generator.set_state(states[f"loader.{index}"])


def _generators(data: Any) -> list[torch.Generator]:
    """The random generators that a DataLoader and its samplers own."""
    sampler = getattr(data, "sampler", None)
    batch_sampler = getattr(data, "batch_sampler", None)
    owners = [data, sampler, batch_sampler, getattr(batch_sampler, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    # A DataLoader hands its generator to its sampler, so one may be found twice.
    return list(dict.fromkeys(generator for generator in found if isinstance(generator, torch.Generator)))
