"""Structures that give every output, or every input, the same number of connections."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rarefy.errors import ConfigError
from rarefy.patterns.structures import Structure


@dataclass(frozen=True)
class ConstantFan(Structure, ABC):
    """Every entry of one dimension has the same number of active connections, all positions of a kernel included."""

    @property
    @abstractmethod
    def counted_axis(self) -> int:
        """0 where outputs have as many connections each, 1 where inputs have."""

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight without inputs."""
        if len(shape) < 2 or not math.prod(shape[1:]):
            raise ConfigError("pattern", self, f"unstructured for {name} {list(shape)}, which has no inputs")

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """A row for each output or input."""
        rows = shape[self.counted_axis]
        return rows, math.prod(shape) // max(rows, 1)

    def fold(self, scores: Tensor) -> Tensor:
        """A row for each output or input."""
        return scores.transpose(0, self.counted_axis).flatten(1)

    def fold_mask(self, mask: Tensor) -> Tensor:
        """A row for each output or input."""
        return self.fold(mask)

    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """In shape again."""
        turned = list(shape)
        turned[0], turned[self.counted_axis] = turned[self.counted_axis], turned[0]
        return units.view(turned).transpose(0, self.counted_axis).contiguous()

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether all that have connections have as many."""
        counts = self.fold(mask).sum(1)
        return counts[counts > 0].unique().numel() <= 1


@dataclass(frozen=True)
class FanIn(ConstantFan):
    """Every output has the same number of active connections (constant fan-in; Lasby et al., arXiv:2305.02299).

    An output is a row of a weight [out, in, …]. A method that ablates outputs may leave some without any.

    Example:
        >>> import torch
        >>> FanIn().keep_top(torch.tensor([[1.0, 2.0, 9.0, 8.0], [3.0, 0.0, 4.0, 5.0]]), 0.5).int().tolist()
        [[0, 0, 1, 1], [0, 0, 1, 1]]
    """

    def __str__(self) -> str:
        return "fan_in"

    @property
    def counted_axis(self) -> int:
        """Outputs."""
        return 0


@dataclass(frozen=True)
class FanOut(ConstantFan):
    """Every input has the same number of active connections (constant fan-out).

    An input is a column of a weight [out, in, …].

    Example:
        >>> import torch
        >>> FanOut().keep_top(torch.tensor([[1.0, 2.0], [3.0, 0.0], [4.0, 9.0], [0.0, 8.0]]), 0.5).int().tolist()
        [[0, 0], [1, 0], [1, 1], [0, 1]]
    """

    def __str__(self) -> str:
        return "fan_out"

    @property
    def counted_axis(self) -> int:
        """Inputs."""
        return 1
