"""The part of an algorithm's state that belongs to weights, and the check of a state before it is loaded."""

from __future__ import annotations

from collections.abc import Collection, Container, Iterable, Mapping
from typing import Any

from torch import nn

from rarefy.errors import RarefyError
from rarefy.storage.parameter import SparseParameter

# An attribute of Transformers' models.
_IGNORED = "_keys_to_ignore_on_save"
# What every release has saved; keys that came later may be missing.
_REQUIRED = {"step", "updates", "seed", "target_sparsity", "dense_gradients"}


def weights_state(parameters: Mapping[str, SparseParameter]) -> dict[str, Any]:
    """Dense gradients of a step that is not over and what is kept for each connection, by parameter name."""
    sums = {name: parameter.saved_gradient() for name, parameter in parameters.items()}
    gradients = {name: value for name, value in sums.items() if value is not None}
    kept = {name: parameter.saved_connections() for name, parameter in parameters.items()}
    connections = {name: value for name, value in kept.items() if value}
    return {"dense_gradients": gradients, **({"connections": connections} if connections else {})}


def load_weights_state(parameters: Mapping[str, SparseParameter], state: Mapping[str, Any]) -> None:
    """Goes on from what `weights_state` returned, which stays as it is.

    Raises:
        RarefyError: it belongs to another topology.
    """
    connections = state.get("connections", {})
    for name, parameter in parameters.items():
        parameter.load_gradient(state["dense_gradients"].get(name))
        parameter.load_connections(connections.get(name, {}))


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


class Ignored(set[str]):
    """Names that a model does not save, masks among them, and what it had in their place before.

    Args:
        names: all of them.
        before: the model's own, of any form; None where only its class had some.
    """

    def __init__(self, names: Iterable[str] = (), before: Collection[str] | None = None) -> None:
        super().__init__(names)
        self.before = before


def keep_masks_out(model: nn.Module, masks: Collection[str]) -> None:
    """Keeps masks out of what `save_pretrained` of Transformers writes: a dense model with zeros, that loads anywhere.

    Args:
        model: sparse; models inside it are told too.
        masks: names of its mask buffers.
    """
    for path, module in model.named_modules():
        if hasattr(module, _IGNORED):
            known = getattr(module, _IGNORED)
            before = known.before if isinstance(known, Ignored) else vars(module).get(_IGNORED)
            # On the module itself: the class is that of other models too.
            setattr(module, _IGNORED, Ignored({*(known or ()), *_inside(masks, path)}, before))


def forget_masks(model: nn.Module, masks: Collection[str]) -> None:
    """The reverse of `keep_masks_out`, once the masks are gone: another buffer may have the name later."""
    for path, module in model.named_modules():
        known = vars(module).get(_IGNORED)
        if not isinstance(known, Ignored):
            continue
        left = known - _inside(masks, path)
        delattr(module, _IGNORED)
        if left != {*(known.before or getattr(module, _IGNORED, None) or ())}:
            setattr(module, _IGNORED, Ignored(left, known.before))
        elif known.before is not None:
            setattr(module, _IGNORED, known.before)


def _inside(masks: Iterable[str], path: str) -> set[str]:
    """The masks that a module at a path has, as it calls them."""
    prefix = f"{path}." if path else ""
    return {name.removeprefix(prefix) for name in masks if name.startswith(prefix)}
