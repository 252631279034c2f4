"""How much faster a sparse run steps than the same run with every weight dense."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from time import perf_counter
from typing import Any

from rarefy.run.builder import Builder
from rarefy.trainer.step import take_step
from rarefy.trainer.trainer import Trainer

# The first step makes the optimizer's state, and after it `compute: auto` decides once more.
_WARM_UP = 2


def speed_up(builder: Builder, trained: Trainer, steps: int) -> float:
    """Median time of a dense step over that of a sparse one; both take turns on the same batches.

    Args:
        builder: of the configuration that `trained` was built from.
        trained: a trainer whose run has ended; its model learns on, its files stay as they are.
        steps: how many steps of each, ≥ 1.

    Returns:
        How many times faster the sparse step is.

    Raises:
        ConfigError: the configuration has no `fit` block.
    """
    dense = replace(builder, config=builder.config.as_dense()).trainer(quiet=True)
    seconds: dict[Trainer, list[float]] = {dense: [], trained: []}
    for batches in islice(_steps_of(builder.train_data, builder), steps + _WARM_UP):
        for trainer, times in seconds.items():
            # In turns, so that whatever else the machine does slows both.
            begin = perf_counter()
            take_step(trainer.session, batches)
            times.append(perf_counter() - begin)
    return statistics.median(seconds[dense][_WARM_UP:]) / statistics.median(seconds[trained][_WARM_UP:])


def _steps_of(data: Any, builder: Builder) -> Iterator[list[Any]]:
    """The micro-batches of one step after the other, without end."""
    batches = iter(cycle(data))
    loop = builder.config.init.loop
    size = 1 if loop is None else loop.grad_accum_steps
    while True:
        yield list(islice(batches, size))
