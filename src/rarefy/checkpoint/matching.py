"""Whether a checkpoint fits the model that it is loaded into; pure functions on state dicts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.checkpoint.mask_names import mask_names
from rarefy.distributed import whole

SHOWN = 3
LOOSE_LOADING = "--disable_strict_checkpoint_loading or --load_checkpoint_states model"


@dataclass(frozen=True)
class MaskDifference:
    """Where the masks of a model and of a checkpoint differ; false when they do not.

    Args:
        missing: sparse parameters of the model that have no mask in the checkpoint.
        surplus: parameters with a mask in the checkpoint that are dense in the model.
        complete: whether not one mask agrees: a sparse run meets a dense checkpoint or the other way round.
    """

    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    complete: bool

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus)

    def problem(self) -> str:
        """What differs, for the user."""
        if self.complete and not self.surplus:
            return f"is dense, but this run is sparse ({first_names(self.missing)})"
        if self.complete and not self.missing:
            return f"is sparse ({first_names(self.surplus)}), but this run is dense"
        lacking = [f"has no mask for {first_names(self.missing)}"] if self.missing else []
        extra = [f"has masks for {first_names(self.surplus)}, dense in this run"] if self.surplus else []
        return " and ".join(lacking + extra)

    def remedy(self) -> str:
        """What the user can do, naming the flags."""
        ways = []
        if self.missing:
            ways.append("prune the parameters without a mask by init_method")
        if self.surplus:
            ways.append("load the others as dense weights with zeros")
        return f"give the matching sparsity, or {LOOSE_LOADING} to {' and '.join(ways)}"


@dataclass(frozen=True)
class ModelDifference:
    """Where the tensors of a model and of a checkpoint differ, masks aside; false when they do not.

    Args:
        missing: names that only the model has.
        surplus: names that only the checkpoint has.
        reshaped: names whose shapes differ, each with both shapes.
    """

    missing: tuple[str, ...]
    surplus: tuple[str, ...]
    reshaped: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.missing or self.surplus or self.reshaped)

    def problem(self) -> str:
        """What differs, for the user."""
        found = {"lacks": self.missing, "has unknown": self.surplus, "has other shapes for": self.reshaped}
        differences = [f"{verb} {first_names(names)}" for verb, names in found.items() if names]
        return f"is of another model: it {' and '.join(differences)}"


def match_masks(model_state: Mapping[str, Tensor], checkpoint_state: Mapping[str, Tensor]) -> MaskDifference:
    """Which sparse parameters have a mask on one side only.

    Args:
        model_state: `model.state_dict()`, after sparsity was applied.
        checkpoint_state: the state dict to load.

    Example:
        >>> sparse = {"fc.weight": torch.ones(2), "fc.weight_mask": torch.ones(2).bool()}
        >>> match_masks(sparse, {"fc.weight": torch.ones(2)}).missing
        ('fc.weight',)
    """
    wanted = mask_names(model_state)
    found = mask_names(checkpoint_state)
    missing = tuple(name for name in wanted if name not in found)
    surplus = tuple(name for name in found if name not in wanted)
    return MaskDifference(missing, surplus, complete=not wanted.keys() & found.keys())


def match_model(model_state: Mapping[str, Tensor], checkpoint_state: Mapping[str, Tensor]) -> ModelDifference:
    """Which names and shapes differ, masks aside.

    Args:
        model_state: `model.state_dict()`.
        checkpoint_state: the state dict to load.

    Example:
        >>> match_model({"w": torch.ones(2)}, {"w": torch.ones(3)}).problem()
        'is of another model: it has other shapes for w ([3] where the model has [2])'
    """
    model = without_masks(model_state)
    checkpoint = without_masks(checkpoint_state)
    reshaped = tuple(
        f"{name} ({list(checkpoint[name].shape)} where the model has {list(model[name].shape)})"
        for name in model
        if name in checkpoint and model[name].shape != checkpoint[name].shape
    )
    missing = tuple(name for name in model if name not in checkpoint)
    return ModelDifference(missing, tuple(name for name in checkpoint if name not in model), reshaped)


def without_masks(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict without its masks; the weights stay as they are."""
    masks = set(mask_names(state).values())
    return {name: tensor for name, tensor in state.items() if name not in masks}


def dense_state(state: Mapping[str, Tensor], parameters: Iterable[str]) -> dict[str, Tensor]:
    """The state dict with some parameters made dense: exact zeros where they were inactive, and no mask.

    Args:
        state: tensors by name, left unchanged.
        parameters: names of sparse parameters in it, such as `MaskDifference.surplus`.

    Example:
        >>> sparse = {"w": torch.ones(2), "w_mask": torch.tensor([True, False])}
        >>> {name: tensor.tolist() for name, tensor in dense_state(sparse, ["w"]).items()}
        {'w': [1.0, 0.0]}
    """
    dense = dict(state)
    masks = mask_names(state)
    for name in parameters:
        mask = dense.pop(masks[name])
        # Masks of other programs may be numbers.
        dense[name] = _selected(dense[name], mask.bool())
    return dense


def _selected(tensor: Tensor, mask: Tensor) -> Tensor:
    """Zeros where the mask is False; selected, as other programs leave numbers, even NaN, there."""
    if tensor.element_size() > 1:
        return torch.where(mask, tensor, 0)
    # Older torch does not select among the small float types.
    return torch.where(mask, tensor.view(torch.int8), 0).view(tensor.dtype)


def first_names(names: tuple[str, ...]) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> first_names(("a", "b", "c", "d", "e"))
        'a, b, c and 2 more'
    """
    more = len(names) - SHOWN
    shown = ", ".join(names[:SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def in_weight(mask: Tensor, saved: Tensor) -> Tensor:
    """What was saved for active connections, in the shape of the weight; zero elsewhere.

    Args:
        mask: bool, the active connections.
        saved: one entry for each in row-major order, or in the shape of the weight; of any number of processes.

    Example:
        >>> in_weight(torch.tensor([[True, False, True]]), torch.tensor([False, True])).tolist()
        [[False, False, True]]
    """
    given = whole(saved).to(mask.device)
    placed = torch.zeros(mask.shape, dtype=given.dtype, device=mask.device)
    placed[mask] = given[mask] if given.shape == mask.shape else given
    return placed
