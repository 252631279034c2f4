"""What rarefy tells torch's compiler; see `torch_private`."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_SOURCES = "dynamic_sources"
_FIXED = "_dynamo_static_indices"
# What a graph has left on what it saved for its backward pass: newer torch, and older.
_CHANGING = ("_dynamo_propagated_dynamic_indices", "_dynamo_weak_dynamic_indices")


def let_sizes_change(prefix: str) -> None:
    """Makes a compiler serve every size of the tensors in attributes whose names begin with `prefix` by one graph.

    Torch takes the sizes of whatever belongs to a parameter for fixed, marks or not (`torch._dynamo.mark_dynamic`), and
    gives a model up that was compiled eight times. This setting alone goes before that. Without it, or in a torch that
    has none, a model is compiled anew whenever a compact weight has another number of connections.

    Args:
        prefix: of attributes that nobody else has; what the setting says of others stays.

    Example:
        >>> let_sizes_change("_rarefy_")
        >>> let_sizes_change("_rarefy_")
        >>> torch.compiler.config.dynamic_sources.count("_rarefy_")
        1
    """
    settings: Any = getattr(torch.compiler, "config", None)
    found = getattr(settings, _SOURCES, None)
    # Names are those of places in a program, such as L['self'].weight._rarefy_order.
    wanted = rf"(?!.*(param_groups|\.state\b)).*\.{prefix}"
    if found is not None and wanted not in found.split(","):
        setattr(settings, _SOURCES, f"{found},{wanted}".strip(","))


def hold_sizes(tensors: Iterable[Tensor]) -> None:
    """Makes compilers take the sizes of tensors for fixed until `let_sizes_go`.

    Torch cannot compile the step of an optimizer whose tensors of a class of their own change their sizes; and it takes
    sizes for changing where they did once, or where another graph has them so, that of the model. Without the names a
    compiled step of an optimizer fails beside a compiled model, and once a topology has changed.

    Args:
        tensors: looked at where a compiler is loaded alone.

    Example:
        >>> import torch._dynamo
        >>> tensor = torch.ones(2, 3)
        >>> hold_sizes([tensor]); tensor._dynamo_static_indices
        {0, 1}
        >>> let_sizes_go([tensor]); hasattr(tensor, "_dynamo_static_indices")
        False
    """
    if _is_loaded():
        for tensor in tensors:
            for name in _CHANGING:
                vars(tensor).pop(name, None)
            setattr(tensor, _FIXED, set(range(tensor.dim())))


def let_sizes_go(tensors: Iterable[Tensor]) -> None:
    """The reverse of `hold_sizes`."""
    if _is_loaded():
        for tensor in tensors:
            vars(tensor).pop(_FIXED, None)


def _is_loaded() -> bool:
    # To ask torch would load it, which takes seconds.
    return "torch._dynamo" in sys.modules
