"""What an algorithm has to know of the optimizer that it follows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    # Without eps a zero moment divides by zero.
    return is_element_wise(optimizer) and all(group.get("eps", 1.0) > 0 for group in optimizer.param_groups)


def is_element_wise(optimizer: optim.Optimizer) -> bool:
    """Whether an optimizer is known to treat every position of a weight by itself, whatever the weight's shape.

    Example:
        >>> is_element_wise(optim.Adafactor([nn.Parameter(nn.Linear(2, 2).weight)]))
        False
    """
    # The very class: a subclass may do anything.
    return type(optimizer) in _ZERO_STAYS_ZERO


def trained_parameters(optimizer: optim.Optimizer) -> dict[nn.Parameter, None]:
    """The parameters in an optimizer's groups: a set that keeps their order.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.bias in trained_parameters(optim.SGD([layer.weight], lr=0.1))
        False
    """
    return dict.fromkeys(parameter for group in optimizer.param_groups for parameter in group["params"])


def with_inner(optimizers: Iterable[optim.Optimizer]) -> list[optim.Optimizer]:
    """The optimizers and those that they wrap, in whichever attribute: SAM, Lookahead, ZeRO and their kin.

    Example:
        >>> inner = optim.SGD([nn.Parameter(nn.Linear(2, 2).weight)], lr=0.1)
        >>> outer = optim.SGD(inner.param_groups[0]["params"], lr=0.1); outer.base = inner
        >>> with_inner([outer]) == [outer, inner]
        True
    """
    found: list[optim.Optimizer] = []
    waiting = list(optimizers)
    while waiting:
        optimizer = waiting.pop(0)
        if any(optimizer is other for other in found):
            continue
        found.append(optimizer)
        waiting += [inner for inner in vars(optimizer).values() if isinstance(inner, optim.Optimizer)]
    return found


def rest_value(optimizer: optim.Optimizer, weight: nn.Parameter, path: Sequence[Any]) -> float:
    """What an optimizer begins with in a state of one number a connection.

    Args:
        optimizer: of torch's classes or one of the same kind by its name.
        weight: whose state it is.
        path: keys that lead to the tensor.

    Example:
        >>> weight = nn.Parameter(nn.Linear(2, 2).weight)
        >>> rest_value(optim.Rprop([weight], lr=0.5), weight, ("step_size",))
        0.5
    """
    kind = type(optimizer).__name__.lower()
    options = {"step_size": "lr"} if "rprop" in kind else {"sum": "initial_accumulator_value"}
    option = options.get(str(path[-1]) if path else "")
    if option is None:
        return 0.0
    groups = (group for group in optimizer.param_groups if any(weight is other for other in group["params"]))
    return float(next(groups, {}).get(option, 0.0))
