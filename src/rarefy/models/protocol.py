"""What a model may offer beyond `forward`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable


class Metrics(Protocol):
    """Sums over the batches of one validation."""

    def update(self, outputs: Any, batch: Any) -> None:
        """Adds one batch: what `forward` returned for it, and the batch itself."""
        ...

    def compute(self) -> dict[str, float]:
        """The metrics by name, each starting with `eval/`, over every batch so far."""
        ...


@runtime_checkable
class ReportsMetrics(Protocol):
    """A model with metrics of its own."""

    def eval_metrics(self) -> Metrics:
        """A fresh accumulator for one validation."""
        ...


@runtime_checkable
class ChecksBatch(Protocol):
    """A model that can tell, before it runs, whether a batch suits it."""

    def check_batch(self, batch: Mapping[str, Any]) -> None:
        """Raises a RarefyError that names what is wrong with the batch."""
        ...


@runtime_checkable
class SplitsBatch(Protocol):
    """A model that knows what its loss is divided by, so that a batch can be learnt part by part."""

    def parts_of(self, batch: Mapping[str, Any], size: int) -> Iterable[Mapping[str, Any]]:
        """Parts of at most `size` samples, whose losses add up to the loss of the batch."""
        ...


@runtime_checkable
class EstimatesMemory(Protocol):
    """A model that can tell how much memory its activations take."""

    def activation_bytes(self, samples: int, length: int, number_bytes: int = 4) -> int:
        """Bytes that one training step keeps for the backward pass and works in, roughly."""
        ...
