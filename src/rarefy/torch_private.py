"""What of torch wants to see every operation: modes and transforms. Without them a short cut may be taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def private(name: str) -> Callable[[], Any]:
    """A private function of torch that tells whether the dispatcher is needed; where it is missing, it always is.

    Args:
        name: in `torch._C`.

    Example:
        >>> private("_no_such_function")()
        True
    """
    return getattr(torch._C, name, lambda: True)


has_mode = private("_len_torch_dispatch_stack")
has_transform = private("_are_functorch_transforms_active")
