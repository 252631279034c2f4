"""What a method that measures first masks, on data or on another checkpoint, has and does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from rarefy.first_masks.competition import compete
from rarefy.first_masks.task import Task

Scope = Annotated[Literal["global", "layer"] | None, Field(description="global or layer", examples=["layer"])]


class FromData(ABC):
    """A way to make first masks that looks at batches.

    Attributes:
        name: as it is written in YAML.
        batches: a number of them, or the batches themselves.
        loss: of (model, batch), or None for what the model returns.
        looks_at_data: whether it wants batches at all.
    """

    name: ClassVar[str]
    looks_at_data: ClassVar[bool] = True
    batches: Any
    loss: Any

    @abstractmethod
    def masks(self, task: Task) -> dict[str, Tensor]:
        """The masks of all weights of a task, bool, by name.

        Raises:
            RarefyError: a weight that the method cannot measure, or would leave without a connection.
        """

    def lets_compete(self, is_by_weight: bool) -> bool:
        """Whether the connections of all weights compete.

        Args:
            is_by_weight: whether each weight has a target of its own where nothing else is asked for.
        """
        scope = getattr(self, "scope", None)
        return scope == "global" or (scope is None and not is_by_weight)

    def chosen(self, task: Task, scores: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of the highest scores, among all weights or within each."""
        shares: Mapping[str, float] = task.targets
        if self.lets_compete(task.is_by_weight):
            shares = compete(scores, task.patterns, task.sparsity, task.seed, f"init_method {self.name}")
        return {name: task.keep_top(name, score, shares[name]) for name, score in scores.items()}
