"""What rarefy tells torch's compiler; see `torch_private`."""

from __future__ import annotations

import sys
from collections.abc import Iterable

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
        >>> import torch.compiler.config as settings
        >>> getattr(settings, "dynamic_sources", "_rarefy_").count("_rarefy_")
        1
    """
    wanted = _source(prefix)
    found = _sources()
    if found is not None and wanted not in found.split(","):
        setattr(torch.compiler.config, _SOURCES, f"{found},{wanted}".strip(","))


def sizes_may_change(prefix: str) -> bool:
    """Whether `let_sizes_change` was called, or a torch that has no such setting may compile.

    Args:
        prefix: as of `let_sizes_change`.

    Example:
        >>> let_sizes_change("_rarefy_")
        >>> sizes_may_change("_rarefy_")
        True
    """
    found = _sources()
    # To ask torch whether it compiles would load its compiler, which takes seconds.
    return "torch._dynamo" in sys.modules if found is None else _source(prefix) in found


def _sources() -> str | None:
    return getattr(getattr(torch.compiler, "config", None), _SOURCES, None)


def _source(prefix: str) -> str:
    # Names are those of places in a program, such as L['self'].weight._rarefy_order.
    return rf"(?!.*(param_groups|\.state\b)).*\.{prefix}"


def hold_sizes(tensors: Iterable[Tensor]) -> None:
    """Makes compilers take the sizes of tensors for fixed until `let_sizes_go`.

    Torch cannot compile the step of an optimizer whose tensors of a class of their own change their sizes; and it takes
    sizes for changing where they did once, or where another graph has them so, that of the model. Without the names a
    compiled step of an optimizer fails beside a compiled model, and once a topology has changed.

    Args:
        tensors: that a step computes with.

    Example:
        >>> tensor = torch.ones(2, 3)
        >>> hold_sizes([tensor]); tensor._dynamo_static_indices
        {0, 1}
        >>> let_sizes_go([tensor]); hasattr(tensor, "_dynamo_static_indices")
        False
    """
    for tensor in tensors:
        for name in _CHANGING:
            vars(tensor).pop(name, None)
        setattr(tensor, _FIXED, set(range(tensor.dim())))


def let_sizes_go(tensors: Iterable[Tensor]) -> None:
    """The reverse of `hold_sizes`."""
    for tensor in tensors:
        vars(tensor).pop(_FIXED, None)
