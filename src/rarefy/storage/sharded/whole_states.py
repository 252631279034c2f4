"""Whole tensors of a file, cut as a model is: a checkpoint may come from any number of processes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from rarefy.distributed import Cut, is_cut
from rarefy.storage.optimizer_state import changed
from rarefy.storage.optimizer_traits import trained_parameters

_STATE = re.compile(r"state\.(\d+)\.")


def cut_like(own: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict whose tensors are cut as those of a model are.

    Args:
        own: the state dict of the model.
        loaded: whole tensors by some of the same names.

    Example:
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
    return {**saved, "state": states, "param_groups": _groups(optimizer, saved["param_groups"])}


def _groups(optimizer: Optimizer, saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The settings that were saved; but a fused step, which torch has of fewer optimizers in pieces, is this run's."""
    groups = [dict(group) for group in saved]
    for group, own in zip(groups, optimizer.param_groups, strict=False):
        if "fused" in group and any(map(is_cut, own["params"])):
            group["fused"] = own.get("fused")
    return groups


def as_named(own: Mapping[str, Tensor]) -> Callable[[str, torch.Size], Cut | None]:
    """How a tensor of a name is cut, where there is one of its shape here.

    Args:
        own: tensors by name.

    Example:
        >>> as_named({"w": torch.ones(1)})("w", torch.Size([1])) is None
        True
    """

    def cut_of(name: str, shape: torch.Size) -> Cut | None:
        tensor = own.get(name)
        return _cut(tensor, shape)

    return cut_of


def as_states_of(optimizer: Optimizer) -> Callable[[str, torch.Size], Cut | None]:
    """How a tensor of an optimizer's state dict is cut, by its name in a file, as the parameter that it belongs to.

    Example:
        >>> optimizer = torch.optim.SGD(torch.nn.Linear(1, 1).parameters())
        >>> as_states_of(optimizer)("state.0.momentum_buffer", torch.Size([1, 1])) is None
        True
    """
    parameters = list(trained_parameters(optimizer))

    def cut_of(name: str, shape: torch.Size) -> Cut | None:
        found = _STATE.match(name)
        index = int(found[1]) if found else len(parameters)
        weight = parameters[index] if index < len(parameters) else None
        return _cut(weight, shape)

    return cut_of


def _cut(tensor: Tensor | None, shape: torch.Size) -> Cut | None:
    return Cut.of(tensor) if tensor is not None and is_cut(tensor) and tensor.shape == shape else None
