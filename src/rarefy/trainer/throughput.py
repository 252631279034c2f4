"""How fast a run trains: samples or tokens a second."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from rarefy.distributed import ranks
from rarefy.models.call import count


@dataclass
class Throughput:
    """Counts what was trained on since the last time that somebody asked."""

    samples: int = 0
    tokens: int | None = None
    since: float = field(default_factory=time.perf_counter)

    def add(self, batches: list[Any]) -> int | None:
        """Adds the micro-batches of one step; returns how many tokens they have, if they have any."""
        counts = [count(batch) for batch in batches]
        tokens = [number for _, number in counts if number is not None]
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
        self.restart()
        # Every process has as much to do as this one.
        return {f"{name}_per_second": ranks() * amount / seconds}

    def restart(self) -> None:
        """Forgets what was counted, so that a validation or a checkpoint does not count as training time."""
        self.samples = 0
        self.tokens = None
        self.since = time.perf_counter()
