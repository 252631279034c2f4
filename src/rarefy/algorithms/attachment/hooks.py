"""Functions of users that are called with what changes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

# Each is called with the algorithm and the name of a parameter first.
SparsityHook = Callable[[Any, str, float], None]
TopologyHook = Callable[[Any, str, Tensor, Tensor], None]


class Hooks:
    """Functions that are called in the order in which they were added.

    Example:
        >>> hooks, heard = Hooks(), []
        >>> handle = hooks.add(heard.append)
        >>> hooks("a"); handle.remove(); hooks("b"); heard
        ['a']
    """

    def __init__(self) -> None:
        # A handle refers to it weakly, which a plain dict does not allow.
        self._hooks: OrderedDict[int, Callable[..., None]] = OrderedDict()

    def __bool__(self) -> bool:
        return bool(self._hooks)

    def __call__(self, *facts: Any) -> None:
        """Calls every function with these facts."""
        # A list of its own: a hook may remove itself.
        for hook in list(self._hooks.values()):
            hook(*facts)

    def add(self, hook: Callable[..., None]) -> RemovableHandle:
        """Adds a hook; the handle takes it out again."""
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle


class UserHooks:
    """The hooks that an algorithm offers, for metrics and logs."""

    def __init__(self) -> None:
        self._target_hooks = Hooks()
        self._computed_hooks = Hooks()
        self._topology_hooks = Hooks()

    def register_target_sparsity_hook(self, hook: SparsityHook) -> RemovableHandle:
        """Calls `hook(algorithm, parameter_name, sparsity)` with what the schedule asks for, at updates."""
        return self._target_hooks.add(hook)

    def register_computed_sparsity_hook(self, hook: SparsityHook) -> RemovableHandle:
        """Calls `hook(algorithm, parameter_name, sparsity)` with what was measured, after every update."""
        return self._computed_hooks.add(hook)

    def register_topology_hook(self, hook: TopologyHook) -> RemovableHandle:
        """Calls `hook(algorithm, parameter_name, old_mask, new_mask)` after every update."""
        return self._topology_hooks.add(hook)
