"""A module's weight between dense and compact, in place: module and parameter stay the same objects."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from rarefy.nn.mask import WeightMask
from rarefy.tensors import Role, SparseWeight, become


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's linear layer, or one like it, whose weight is [in, out].

    Example:
        >>> is_conv1d(nn.Conv1d(2, 2, 2))
        False
    """
    kind = type(module)
    is_theirs = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return is_theirs or kind.__name__ == "SparseConv1D"


def make_compact(
    module: nn.Module, leaf: str, mask: Tensor, mask_leaf: str, block: tuple[int, int] | None = None
) -> SparseWeight:
    """Stores only the active connections of a weight.

    Hooks, references and optimizers of the parameter stay valid. Nothing random is drawn.

    Args:
        module: holds the weight.
        leaf: attribute name of the weight.
        mask: bool, its shape.
        mask_leaf: name of the buffer that shows the mask.
        block: outputs and inputs of the blocks in which masks of the weight come, if they do.

    Returns:
        The parameter, which is the same object as before.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> weight = layer.weight
        >>> mask = weight > 0
        >>> make_compact(layer, "weight", mask, "weight_mask") is weight is layer.weight
        True
        >>> type(layer) is nn.Linear and bool((layer.weight_mask == mask).all())
        True
    """
    parameter: Any = getattr(module, leaf)
    dense = parameter.dense() if isinstance(parameter, SparseWeight) else parameter.detach()
    weight = SparseWeight.from_dense(dense, mask, Role.MANAGED, is_conv1d(module), block)
    become(parameter, weight.requires_grad_(parameter.requires_grad))
    show_mask(module, parameter, mask_leaf)
    return parameter


def show_mask(module: nn.Module, weight: SparseWeight, mask_leaf: str) -> None:
    """Puts the mask of a compact weight beside it."""
    if mask_leaf in dict(module.named_buffers(recurse=False, remove_duplicate=False)):
        setattr(module, mask_leaf, WeightMask(weight))
    else:
        module.register_buffer(mask_leaf, WeightMask(weight))


def make_dense(module: nn.Module, leaf: str, mask_leaf: str | None = None) -> Any:
    """The reverse of `make_compact`: zeros at inactive connections.

    Args:
        module: holds the weight; a dense one is left as it is.
        leaf: attribute name of the weight.
        mask_leaf: a buffer to be removed, if it is there.
    """
    parameter: Any = getattr(module, leaf)
    if isinstance(parameter, SparseWeight):
        become(parameter, nn.Parameter(parameter.dense(), parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
        if name == mask_leaf or (isinstance(buffer, WeightMask) and buffer.weight is parameter):
            delattr(module, name)
    return parameter
