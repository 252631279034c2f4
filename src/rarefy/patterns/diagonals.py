"""The structure of whole diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.errors import ConfigError
from rarefy.patterns.structures import Structure


@dataclass(frozen=True)
class Diagonals(Structure):
    """Connections are active in whole diagonals (Tyagi et al., arXiv:2506.11449).

    A matrix [out, in] has max(out, in) diagonals of min(out, in) connections each, which go on at the other end of the
    longer side: d has those of output i and input (i + d) mod in, or, where there are more outputs, of input j and
    output (j + d) mod out. So the features of the shorter side have as many connections each. Each position of a
    convolution's kernel has diagonals of its own. Their score is the sum of those of their connections.

    Example:
        >>> scores = torch.tensor([[1.0, 0.0, 5.0], [4.0, 1.0, 0.0]])
        >>> Diagonals().fold(scores).tolist(), Diagonals().keep_top(scores, 0.67).int().tolist()
        ([[2.0, 0.0, 9.0]], [[0, 0, 1], [1, 0, 0]])
    """

    def __str__(self) -> str:
        return "diagonal"

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight without inputs."""
        if len(shape) < 2 or not math.prod(shape[1:]):
            raise ConfigError("pattern", self, f"unstructured for {name} {list(shape)}, which has no inputs")

    def layout(self, shape: Sequence[int]) -> tuple[int, int]:
        """A row for each position of the kernel."""
        return math.prod(shape[2:]), max(shape[:2])

    def fold(self, scores: Tensor) -> Tensor:
        """The sums of the diagonals."""
        wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
        matrices = wide.flatten(2).movedim(2, 0) if wide.dim() > 2 else wide.unsqueeze(0)
        flat = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT
        places, short, long = flat.shape
        # Each row twice, so that a diagonal that begins in it does not leave it.
        twice = torch.cat([flat, flat], 2).contiguous()
        return twice.as_strided((places, short, long), (2 * short * long, 2 * long + 1, 1)).sum(1)

    def unfold(self, units: Tensor, shape: Sequence[int]) -> Tensor:
        """Each diagonal all active or all inactive."""
        places, long = units.shape
        short = min(shape[:2])
        # Row i begins i units before the end of the first half; strides go forwards only, so from the last row on.
        twice = torch.cat([units, units], 1)
        flat = twice.as_strided((places, short, long), (2 * long, 1, 1), long - short + 1).flip(1)
        matrices = flat if shape[0] <= shape[1] else flat.mT
        return matrices.movedim(0, 2).reshape(*shape)

    def holds(self, mask: Tensor, sparsity: float) -> bool:
        """Whether no diagonal is active in part only."""
        return torch.equal(self.unfold(self.fold_mask(mask), mask.shape), mask)
