"""What the mask of a weight is called, in a module and in a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

_SUFFIX = "_mask"
_MORE = "_sparsity"


def free_mask_name(name: str, is_taken: Callable[[str], bool]) -> str:
    """The name for the mask of a weight: `<name>_mask`, or `<name>_sparsity_mask` where that name is taken.

    Args:
        name: of the weight.
        is_taken: whether something else has a name.

    Example:
        >>> free_mask_name("weight", {"weight_mask"}.__contains__), free_mask_name("bias", {"weight_mask"}.__contains__)
        ('weight_sparsity_mask', 'bias_mask')
    """
    while is_taken(name + _SUFFIX):
        name += _MORE
    return name + _SUFFIX


def mask_names(state: Mapping[str, Tensor]) -> dict[str, str]:
    """Parameter name → name of its mask, for every sparse parameter of a state dict.

    Args:
        state: tensors by name; a mask is of its parameter's shape, and called as `free_mask_name` says.

    Example:
        >>> import torch
        >>> mask_names({"fc.weight": torch.ones(2), "fc.weight_mask": torch.ones(2).bool()})
        {'fc.weight': 'fc.weight_mask'}
    """
    found: dict[str, str] = {}
    for name, tensor in state.items():
        parameter = _parameter_of(name, state)
        # A model's own `attention_mask` is told from a mask of `attention` by its shape.
        if parameter is None or state[parameter].shape != tensor.shape:
            continue
        # Where there is the longer name, the shorter one is the module's own.
        found[parameter] = max(name, found.get(parameter, name), key=len)
    return found


def _parameter_of(name: str, state: Mapping[str, Tensor]) -> str | None:
    if not name.endswith(_SUFFIX):
        return None
    parameter = name.removesuffix(_SUFFIX)
    while parameter not in state and parameter.endswith(_MORE):
        parameter = parameter.removesuffix(_MORE)
    return parameter if parameter in state else None
