"""What rarefy tells torch's compiler; see `torch_private`."""

from __future__ import annotations

from typing import Any

import torch

_SOURCES = "dynamic_sources"


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
