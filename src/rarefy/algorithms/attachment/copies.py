"""Copies that follow the topology of the model: averages of weights, target networks."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_swa_avg_fn

from rarefy.errors import RarefyError
from rarefy.storage.compact import CompactStorage
from rarefy.tensors import SparseWeight

# Of the algorithm itself, which does not go along.
COPIED = (
    "the copy of an algorithm that is applied holds no model: a model that was copied with it is a plain one, which "
    "trains densely; to go on with copies, apply the copied algorithm to the copied model and a new optimizer, then "
    "load the state_dict() of all three"
)
PICKLED = (
    "an algorithm cannot be pickled, as it belongs to a model and its optimizer; build it where it is used, apply it "
    "and load the state_dict() of the first"
)


class Copies:
    """The copies of one model, none of which is kept alive."""

    def __init__(self) -> None:
        self._copies: list[tuple[weakref.ref[nn.Module], str]] = []

    def add(self, copy: nn.Module, names: Sequence[str]) -> str:
        """Lets a copy follow from now on.

        Args:
            copy: has the sparse weights of the model, under a common prefix maybe (`module.` of `AveragedModel`).
            names: of the sparse weights.

        Returns:
            The prefix.

        Raises:
            RarefyError: the copy lacks one of the weights.
        """
        prefix = _prefix(copy, names)
        self._copies.append((weakref.ref(copy), prefix))
        if isinstance(copy, AveragedModel) and copy.use_buffers:
            _average_only_numbers(copy)
        return prefix

    def follow(self, name: str, mask_leaf: str, old: Tensor, new: Tensor, weight: Tensor) -> None:
        """Gives every copy the new topology of a weight.

        Args:
            name: of the weight in the model.
            mask_leaf: attribute name of its mask.
            old: its mask until now.
            new: its mask from now on.
            weight: its dense weight, which new connections take.
        """
        self._copies = [entry for entry in self._copies if entry[0]() is not None]
        for reference, prefix in self._copies:
            copy = reference()
            if copy is not None:
                follow_topology(*place_of(copy, prefix + name), mask_leaf, old, new, weight)


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and its attribute name.

    Example:
        >>> place_of(nn.Sequential(nn.Linear(2, 2)), "0.weight")
        (Linear(in_features=2, out_features=2, bias=True), 'weight')
    """
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


@torch.no_grad()
def follow_topology(
    module: nn.Module, leaf: str, mask_leaf: str, old: Tensor, new: Tensor, weight: Tensor
) -> None:
    """Makes the weight of a copy obey a new mask: new connections take the values of `weight`, dropped ones go.

    Args:
        module: of the copy.
        leaf: attribute name of its weight.
        mask_leaf: that of its mask, if it has one.
        old: the mask until now.
        new: the mask from now on.
        weight: the dense weight of the model.

    Example:
        >>> layer, mask = nn.Linear(2, 1), torch.tensor([[True, False]])
        >>> follow_topology(layer, "weight", "weight_mask", mask, ~mask, torch.tensor([[1.0, 7.0]]))
        >>> layer.weight.tolist()
        [[0.0, 7.0]]
    """
    parameter = getattr(module, leaf)
    is_compact = isinstance(parameter, SparseWeight)
    own: Tensor = parameter.dense() if is_compact else parameter.detach()
    old = old.to(own.device)
    new = new.to(own.device)
    weight = weight.to(own)
    wanted = torch.where(new, torch.where(old, own, weight), 0)
    if is_compact:
        storage = CompactStorage(module, leaf, mask_leaf)
        # No optimizer trains a copy.
        storage.set_mask(new, [])
        storage.entries.copy_(storage.collect(wanted))
    else:
        own.copy_(wanted)
    mask = own_mask(module, leaf, mask_leaf)
    if mask is not None:
        mask.copy_(new)


def own_mask(module: nn.Module, leaf: str, mask_leaf: str) -> Tensor | None:
    """The mask beside a weight of a copy; None where there is none.

    Example:
        >>> own_mask(nn.Linear(2, 2), "weight", "weight_mask") is None
        True
    """
    mask = getattr(module, mask_leaf, None)
    fits = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == getattr(module, leaf).shape
    return mask if fits else None


def _prefix(copy: nn.Module, names: Sequence[str]) -> str:
    own = {name for name, _ in copy.named_parameters()}
    first = names[0]
    # The shortest prefix first: a copy may hold another model deeper inside.
    for found in sorted((name for name in own if name.endswith(first)), key=len):
        prefix = found.removesuffix(first)
        if all(prefix + name in own for name in names):
            return prefix
    missing = next((name for name in names if name not in own), first)
    raise RarefyError(
        f"track takes a copy of the model that was made sparse, or a module that holds one; {missing} is not in it"
    )


def _average_only_numbers(averaged: AveragedModel) -> None:
    """Lets an average with buffers copy masks instead of averaging them, which torch cannot do for bool."""
    if averaged.multi_avg_fn is not None:
        averaged.multi_avg_fn = partial(_average_many, averaged.multi_avg_fn)
    else:
        averaged.avg_fn = partial(_average_one, averaged.avg_fn or get_swa_avg_fn())


def _average_one(function: Callable[..., Any], own: Any, other: Any, count: Any) -> Any:
    return other if own.dtype == torch.bool else function(own, other, count)


def _average_many(function: Callable[..., None], own: Any, other: Any, count: Any) -> None:
    if own[0].dtype != torch.bool:
        function(own, other, count)
    else:
        for mine, theirs in zip(own, other, strict=True):
            mine.copy_(theirs)
