"""What an algorithm needs around its state: hooks of its users, and the check of a state before it is loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Container, Mapping
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.storage.parameter import SparseParameter

_REQUIRED = {"step", "updates", "seed", "target_sparsity", "dense_gradients"}


def register(hooks: OrderedDict[int, Any], hook: Callable[..., None]) -> RemovableHandle:
    """Adds a hook; the handle takes it out again.

    Example:
        >>> hooks = OrderedDict()
        >>> handle = register(hooks, print)
        >>> handle.remove(); len(hooks)
        0
    """
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def is_watched(weight: nn.Parameter) -> bool:
    """Whether an algorithm selects this weight's gradient, through whichever module it was reached.

    Example:
        >>> is_watched(nn.Linear(2, 2).weight)
        False
    """
    hooks = (getattr(weight, "_post_accumulate_grad_hooks", None) or {}).values()
    return any(isinstance(hook, partial) and isinstance(hook.args[0], SparseParameter) for hook in hooks)


def refuse_taken(candidate: Candidate, parameters: Container[str]) -> None:
    """Refuses a weight that has an algorithm, or whose name another one has.

    Args:
        candidate: the weight.
        parameters: names of the algorithm's sparse weights so far.

    Raises:
        RarefyError: it is taken.
    """
    name = candidate.name
    if name in parameters:
        raise RarefyError(f"a second parameter is called {name}; apply to the module that holds both")
    if is_watched(candidate.parameter):
        raise RarefyError(
            f"{name} has a sparsity algorithm already; use one algorithm, or a Group of several"
        )


def gradient_state(parameters: Mapping[str, SparseParameter]) -> dict[str, Any]:
    """The dense gradients of a step that is not over, by parameter name, to be saved."""
    sums = {name: parameter.dense_gradient.saved() for name, parameter in parameters.items()}
    return {name: value for name, value in sums.items() if value is not None}


def check_state(state: Any, name: str, parameters: Container[str]) -> None:
    """Refuses a state that an algorithm cannot take.

    Args:
        state: what `load_state_dict` was given.
        name: of the algorithm.
        parameters: names of its sparse weights.

    Raises:
        RarefyError: the state belongs to another algorithm or to other parameters.

    Example:
        >>> check_state({"algorithm": "set"}, "rigl", {})
        Traceback (most recent call last):
        rarefy.errors.RarefyError: this sparsity state is of set, not of rigl; load it into the same algorithm
    """
    if not isinstance(state, Mapping) or state.get("algorithm") != name:
        found = state.get("algorithm") if isinstance(state, Mapping) else f"{type(state).__name__}"
        raise RarefyError(
            f"this sparsity state is of {found}, not of {name}; load it into the same algorithm"
        )
    missing = _REQUIRED - set(state)
    if missing:
        raise RarefyError(
            f"this sparsity state lacks {', '.join(sorted(missing))}; was it saved by state_dict()?"
        )
    unknown = [key for key in state["dense_gradients"] if key not in parameters]
    if unknown:
        raise RarefyError(f"this sparsity state has gradients of {min(unknown)}, which is not sparse here")
