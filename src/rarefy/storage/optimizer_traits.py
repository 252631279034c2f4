"""What an algorithm has to know of the optimizer that it follows."""

from __future__ import annotations

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


def trained_parameters(optimizer: optim.Optimizer) -> dict[nn.Parameter, None]:
    """The parameters in an optimizer's groups: a set that keeps their order.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.bias in trained_parameters(optim.SGD([layer.weight], lr=0.1))
        False
    """
    return dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"])
