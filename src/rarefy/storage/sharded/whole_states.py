"""Whole tensors of a file, cut as a model is: a checkpoint may come from any number of processes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from rarefy.distributed import Cut, is_cut
from rarefy.storage.optimizer_state import changed
from rarefy.storage.optimizer_traits import trained_parameters


def cut_like(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors are cut as those of a model are.

    Args:
        own: the state dict of the model.
        loaded: whole tensors by some of the same names.

    Example:
        >>> import torch
        >>> cut_like({"w": torch.ones(1)}, {"w": torch.zeros(1)})
        {'w': tensor([0.])}
    """
    return {
        name: cut_as(own[name], tensor) if name in own and is_cut(own[name]) else tensor
        for name, tensor in loaded.items()
    }


def cut_as(like: Tensor, whole: Tensor) -> Tensor:
    """A whole tensor of the shape of a DTensor, cut as that is."""
    if is_cut(whole):
        return whole
    cut = Cut.of(like)
    return cut.wrap(cut.own(whole).clone().to(cut.device))


def cut_states(optimizer: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """A whole state dict of an optimizer, with each tensor of the shape of a sharded parameter cut as that is.

    Args:
        optimizer: that is about to load.
        saved: its state dict; left as it is.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
        >>> cut_states(optimizer, optimizer.state_dict())["state"]
        {}
    """
    parameters = list(trained_parameters(optimizer))
    states = {}
    for index, state in saved["state"].items():
        weight = parameters[index] if index < len(parameters) else None
        if weight is None or not is_cut(weight):
            states[index] = state
            continue
        states[index] = changed(
            state,
            lambda _, tensor, shape=weight.shape: tensor.shape == shape,
            lambda _, tensor, weight=weight: cut_as(weight, tensor),
        )
    return {**saved, "state": states}
