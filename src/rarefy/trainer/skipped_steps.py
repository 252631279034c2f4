"""Steps that are left out because a loss or a gradient is not finite, and when there are too many of them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rarefy.distributed import local_part
from rarefy.errors import RarefyError


class NotFiniteError(RarefyError):
    """Too many steps in a row had a loss or gradients that are not finite."""


@dataclass
class SkippedSteps:
    """Counts the steps that were skipped because something was not finite.

    Args:
        limit: how many in a row end the run.
        total: how many there were.
        in_a_row: how many there were since the last good step.
    """

    limit: int
    total: int = 0
    in_a_row: int = 0

    def good(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def bad(self) -> None:
        """A step was skipped."""
        self.total += 1
        self.in_a_row += 1

    @property
    def too_many(self) -> bool:
        """Whether the run has to end."""
        return self.in_a_row >= self.limit

    def error(self, culprit: str, checkpoint: Path) -> NotFiniteError:
        """The error that ends the run.

        Args:
            culprit: what was not finite.
            checkpoint: where the state is.
        """
        return NotFiniteError(
            f"{self.in_a_row} steps in a row were skipped, the last one because {culprit}; the state before "
            f"them is saved in {checkpoint}; try a lower learning rate, or max_gradient_norm in precision"
        )


def first_not_finite(gradients: Iterable[tuple[str, Tensor | None]], loss: float) -> str:
    """What was not finite, for the user.

    Args:
        gradients: every parameter's name and gradient, in model order.
        loss: the loss of the step.

    Example:
        >>> first_not_finite([("w", torch.ones(1)), ("b", torch.tensor([torch.nan]))], 0.5)
        'the gradient of b is not finite'
    """
    for name, gradient in gradients:
        if gradient is not None and not bool(torch.isfinite(local_part(gradient)).all()):
            return f"the gradient of {name} is not finite"
    # All gradients finite: the sum of their squares can still be too large for a float.
    return (
        "the norm of the gradients overflows" if torch.isfinite(torch.tensor(loss)) else f"the loss is {loss}"
    )
