"""How fast a run trains: samples or tokens a second, and how much of the time it waits for other processes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from rarefy.distributed import Traffic, ranks
from rarefy.models.call import count


@dataclass
class Throughput:
    """Counts what was trained on since the last time that somebody asked.

    Args:
        traffic: what this process gave into exchanges so far.
    """

    traffic: Callable[[], Traffic] = Traffic
    samples: int = 0
    tokens: int | None = None
    steps: int = 0
    since: float = field(default_factory=time.perf_counter)
    _exchanged: Traffic = field(default_factory=Traffic)

    def add(self, batches: list[Any]) -> int | None:
        """Adds the micro-batches of one step; returns how many tokens they have, if they have any."""
        counts = [count(batch) for batch in batches]
        tokens = [number for _, number in counts if number is not None]
        self.steps += 1
        self.samples += sum(samples for samples, _ in counts)
        if not tokens:
            return None
        self.tokens = (self.tokens or 0) + sum(tokens)
        return sum(tokens)

    def take(self) -> dict[str, float]:
        """The rate since `since`; counting starts afresh."""
        now = time.perf_counter()
        # A clock may give the same time twice.
        seconds = max(now - self.since, 1e-9)
        name, amount = ("samples", self.samples) if self.tokens is None else ("tokens", self.tokens)
        exchanged = self._communication(seconds)
        self.restart()
        # Every process has as much to do as this one.
        return {f"{name}_per_second": ranks() * amount / seconds, **exchanged}

    def _communication(self, seconds: float) -> dict[str, float]:
        """Seconds and bytes a step, and the share of the time; nothing where nothing was exchanged."""
        spent = self.traffic() - self._exchanged
        if not spent.bytes:
            return {}
        steps = max(self.steps, 1)
        return {
            "communication/seconds": spent.seconds / steps,
            "communication/bytes": spent.bytes / steps,
            "communication/share": spent.seconds / seconds,
        }

    def restart(self) -> None:
        """Forgets what was counted, so that a validation or a checkpoint does not count as training time."""
        self.samples = 0
        self.tokens = None
        self.steps = 0
        self._exchanged = self.traffic()
        self.since = time.perf_counter()
