"""What an algorithm has to know of the optimizer that it follows."""

from __future__ import annotations

from typing import Any

from torch import nn, optim

_ZERO_STAYS_ZERO = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
)


def preserves_zeros(optimizer: optim.Optimizer) -> bool:
    """Whether a connection with zero weight, gradient and state stays so without help.

    True for torch's element-wise optimizers only; for all others (Adafactor, Muon, one's own) an algorithm restores the
    zeros after the step.

    Example:
        >>> weights = [nn.Parameter(nn.Linear(2, 2).weight)]
        >>> preserves_zeros(optim.AdamW(weights)), preserves_zeros(optim.Adafactor(weights))
        (True, False)
    """
    return is_element_wise(optimizer) and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


def is_element_wise(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer is known to treat every position of a weight by itself, whatever the weight's shape.

    Example:
        >>> is_element_wise(optim.Adafactor([nn.Parameter(nn.Linear(2, 2).weight)]))
        False
    """
    return type(optimizer) in _ZERO_STAYS_ZERO


def skipped_its_step(optimizer: optim.Optimizer) -> bool:
    """Whether a fused optimizer was told by a GradScaler to leave everything as it is.

    Example:
        >>> skipped_its_step(optim.SGD([nn.Parameter(nn.Linear(2, 2).weight)], lr=0.1))
        False
    """
    found: Any = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def trained_by(optimizer: optim.Optimizer) -> set[nn.Parameter]:
    """The parameters in an optimizer's groups.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.bias in trained_by(optim.SGD([layer.weight], lr=0.1))
        False
    """
    return {parameter for group in optimizer.param_groups for parameter in group["params"]}
