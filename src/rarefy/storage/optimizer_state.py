"""The part of an optimizer's state that belongs to connections: every tensor of the shape of its weight."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Change = Callable[[Tensor], Tensor]


def changed(state: Any, shape: Iterable[int], change: Change) -> Any:
    """A nested state in which every tensor of `shape` is replaced by what `change` makes of it.

    Args:
        state: tensors in dicts, lists and tuples, other values among them; left as it is.
        shape: of the tensors to replace.
        change: tensor → tensor.

    Returns:
        New containers; values that are not replaced are shared.

    Example:
        >>> changed({"step": torch.tensor(1.0), "m": torch.ones(2)}, (2,), torch.neg)
        {'step': tensor(1.), 'm': tensor([-1., -1.])}
    """
    wanted = tuple(shape)
    if isinstance(state, Tensor):
        return change(state) if tuple(state.shape) == wanted else state
    if isinstance(state, dict):
        copied = copy.copy(state)
        copied.update({key: changed(value, wanted, change) for key, value in state.items()})
        return copied
    if type(state) in (list, tuple):
        return type(state)([changed(value, wanted, change) for value in state])
    return state


def same_shaped(state: Any, shape: Iterable[int]) -> list[Tensor]:
    """Every tensor of `shape` in a nested state.

    Example:
        >>> same_shaped({"step": torch.tensor(1.0), "m": [torch.ones(2)]}, (2,))
        [tensor([1., 1.])]
    """
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    changed(state, shape, note)
    return found


def change_state(
    optimizers: Iterable[Optimizer], weight: nn.Parameter, shape: Iterable[int], change: Change
) -> None:
    """Replaces every tensor of `shape` among the states that optimizers keep for `weight`.

    Args:
        optimizers: those that know nothing of the weight are left alone.
        weight: the parameter.
        shape: of the tensors to replace.
        change: tensor → tensor; called without gradients.

    Example:
        >>> weight = nn.Parameter(torch.ones(2)); optimizer = torch.optim.SGD([weight], lr=1.0, momentum=0.9)
        >>> weight.sum().backward(); optimizer.step()
        >>> change_state([optimizer], weight, weight.shape, torch.zeros_like)
        >>> optimizer.state[weight]["momentum_buffer"]
        tensor([0., 0.])
    """
    with torch.no_grad():
        for optimizer in optimizers:
            if weight in optimizer.state:
                optimizer.state[weight] = changed(optimizer.state[weight], shape, change)


def saved_indices(optimizer: Optimizer) -> dict[nn.Parameter, int]:
    """Under which number an optimizer's state dict keeps each of its parameters.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> saved_indices(torch.optim.SGD(layer.parameters(), lr=0.1))[layer.bias]
        1
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {parameter: index for index, parameter in enumerate(parameters)}
