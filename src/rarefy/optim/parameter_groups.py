"""Which parameters get weight decay, and whose learning rate is scaled."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import nn

from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.validation import shorten

SCALE_KEY = "adjust_learning_rate"
_NO_DECAY_KINDS = ("norm", "embedding")

Groups = Mapping[str, tuple[Sequence[str], float]]


@runtime_checkable
class ScalesLearningRates(Protocol):
    """A model that has names for groups of its parameters whose learning rates may be scaled."""

    def learning_rate_groups(self) -> Groups:
        """By name: globs of the parameters, and the factor that the model itself asks for (muP), else 1."""
        ...


def parameter_groups(
    model: nn.Module,
    *,
    split: bool = True,
    scales: Mapping[str, float] | None = None,
    densities: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """A model's trainable parameters, those without weight decay in groups of their own.

    Args:
        model: the model.
        split: False for no groups by weight decay.
        scales: the factor of the learning rate by parameter name, 1 where it says nothing; such groups have it as
            `adjust_learning_rate`.
        densities: in (0, 1] by parameter name, 1 where it says nothing; it divides the factor (SµPar).

    Returns:
        Groups as `torch.optim` takes them, unscaled ones first; empty ones are left out.

    Example:
        >>> [len(group["params"]) for group in parameter_groups(nn.Linear(2, 2))]
        [1, 1]
    """
    exempt = _without_decay(model) if split else set()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    kinds: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in trained.items():
        kind = ((scales or {}).get(name, 1.0), (densities or {}).get(name, 1.0))
        kinds.setdefault(kind, []).append(parameter)
    found: list[dict[str, Any]] = []
    # In a fixed order, unscaled ones first: an optimizer's state knows parameters by their places in the groups.
    for scale, density in sorted(kinds, key=lambda kind: (kind != (1.0, 1.0), kind)):
        mine = kinds[scale, density]
        decayed: dict[str, Any] = {"params": [parameter for parameter in mine if parameter not in exempt]}
        others: dict[str, Any] = {
            "params": [parameter for parameter in mine if parameter in exempt],
            "weight_decay": 0.0,
        }
        for group in (decayed, others):
            if (scale, density) != (1.0, 1.0):
                group[SCALE_KEY] = scale / density
            if group["params"]:
                found.append(group)
    return found


def learning_rate_scales(model: nn.Module, given: Any, path: str) -> dict[str, float]:
    """The factor of every parameter's learning rate that is not 1.

    Args:
        model: it may be a `ScalesLearningRates`.
        given: `adjust_learning_rate` of a file: factors by the names of the model's groups, in place of its own.
        path: where that stands.

    Raises:
        ConfigError: not a map of numbers above 0, or a group that the model does not have.

    Example:
        >>> learning_rate_scales(nn.Linear(2, 2), None, "adjust_learning_rate")
        {}
    """
    groups = dict(model.learning_rate_groups()) if isinstance(model, ScalesLearningRates) else {}
    for name, factor in _checked(given, groups, path).items():
        groups[name] = (groups[name][0], factor)
    scales: dict[str, float] = {}
    for globs, factor in groups.values():
        for name, _ in model.named_parameters() if factor != 1.0 else ():
            if any(fnmatch.fnmatchcase(name, glob) for glob in globs):
                # The first group that a parameter is in decides.
                scales.setdefault(name, factor)
    return scales


def _checked(given: Any, groups: Groups, path: str) -> dict[str, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ConfigError(
            path, shorten(given), "a map from a group of parameters to a factor", "{embedding: 0.5}"
        )
    for name, factor in given.items():
        where = join_path(path, str(name))
        if name not in groups:
            known = did_you_mean(str(name), groups) if groups else "this model has none"
            raise ConfigError(path, f"the group {name!r}", f"a group of the model ({known})")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise ConfigError(where, shorten(factor), "a number above 0", f"{name}: 0.5")
    return {str(name): float(factor) for name, factor in given.items()}


def _without_decay(model: nn.Module) -> set[nn.Parameter]:
    found = set()
    for module in model.modules():
        # The bases too: a layer norm by another name is still one.
        kinds = " ".join(kind.__name__.lower() for kind in type(module).__mro__)
        exempt_module = any(word in kinds for word in _NO_DECAY_KINDS)
        for leaf, parameter in module.named_parameters(recurse=False):
            if exempt_module or leaf.endswith(("bias", "biases")) or "embedding" in leaf:
                found.add(parameter)
    return found
