"""Optimizers by their Model Zoo names: options by name, and which parameters have which learning rate and decay."""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.optim import Optimizer

from rarefy.distributed import is_cut
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.imports import import_object, is_import_path
from rarefy.optim.density_scaling import DENSITY_KEY
from rarefy.validation import shorten
from rarefy.validation.numerals import read_number, share_hint

SCALE_KEY = "adjust_learning_rate"
# What a file may call an option, and its name in torch.
OTHER_NAMES: Mapping[str, str] = {"learning_rate": "lr"}
_NO_DECAY_KINDS = ("norm", "embedding")

Groups = Mapping[str, tuple[Sequence[str], float]]

# The base class, one that steps with a closure only, and one for sparse gradients only.
_NEEDS_MORE = {"Optimizer", "LBFGS", "SparseAdam"}
_FUSED = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_EXAMPLE = "AdamW: {lr: 1.0e-3, weight_decay: 0.1}"


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


_FUSED_IN_PIECES = (torch.optim.Adam, torch.optim.AdamW)


def build_optimizer(
    config: Any,
    model: nn.Module,
    path: str = "optimizer",
    *,
    learning_rate: float | None = None,
    densities: Mapping[str, float] | None = None,
    base_dir: Path | None = None,
    allow_imports: bool = True,
) -> Optimizer:
    """The optimizer of an `optimizer:` block.

    Parameters called bias, those of normalisation layers and embeddings get no weight decay. Learning rates are scaled
    where the model asks for it (muP) or `adjust_learning_rate` does. Adam, AdamW and SGD take
    torch's fused step unless the options name another.

    Args:
        config: a map from one class, of `torch.optim` in any case or an import path, to its options;
            `learning_rate` means `lr`.
        model: whose trainable parameters it gets.
        path: where the block stands in the user's file.
        learning_rate: used where the options hold none; the first value of the schedulers.
        densities: `sparsity.densities`, which divide the learning rates of its weights; empty but under SµPar.
        base_dir: folder that `./file.py:Name` import paths start from.
        allow_imports: whether import paths may be followed.

    Returns:
        The optimizer, with one group or two (with weight decay first), and two more for every scale of learning rates.

    Raises:
        ConfigError: an unknown class, an option that it does not take, or nothing to train.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        >>> optimizer = build_optimizer({"adamw": {"learning_rate": 0.1, "weight_decay": 0.01}}, model)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(1, 0.01), (3, 0.0)]
    """
    name, options = _split(config, path)
    here = join_path(path, name)
    kind = _optimizer_class(name, path, base_dir, allow_imports)
    scales = learning_rate_scales(model, options.pop(SCALE_KEY, None), join_path(here, SCALE_KEY))
    options = _torch_options(kind, options, here)
    if learning_rate is not None and _takes(kind, "lr"):
        options.setdefault("lr", learning_rate)
    groups = parameter_groups(model, split=_takes(kind, "weight_decay"), scales=scales, densities=densities)
    if not groups:
        raise ConfigError(path, "a model without trainable parameters", "a model with some (requires_grad)")
    _scale(groups, options, kind, here)
    _mark(groups, model, densities or {})
    return _construct(kind, groups, options, _implementation(kind, model, options), here)


def _split(config: Any, path: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(config, Mapping) or len(config) != 1:
        raise ConfigError(path, shorten(config), "a map from one optimizer to its options", _EXAMPLE)
    [(name, options)] = config.items()
    if options is not None and not isinstance(options, Mapping):
        raise ConfigError(join_path(path, str(name)), shorten(options), "a map of options", _EXAMPLE)
    return str(name), dict(options or {})


def optimizer_classes() -> dict[str, Any]:
    """The optimizers of `torch.optim` that a file may name.

    Example:
        >>> "AdamW" in optimizer_classes(), "LBFGS" in optimizer_classes()
        (True, False)
    """
    return {key: kind for key, kind in vars(torch.optim).items() if _is_usable(key, kind)}


def _optimizer_class(name: str, path: str, base_dir: Path | None, allow_imports: bool) -> Any:
    if is_import_path(name):
        return import_object(name, path=path, base_dir=base_dir, allow_imports=allow_imports)
    known = optimizer_classes()
    by_lower = {key.lower(): kind for key, kind in known.items()}
    if name.lower() not in by_lower:
        allowed = f"an optimizer of torch.optim ({did_you_mean(name, known)}) or package.module:Class"
        raise ConfigError(path, name, allowed, _EXAMPLE)
    return by_lower[name.lower()]


def _is_usable(name: str, kind: Any) -> bool:
    """Whether a member of `torch.optim` is an optimizer that steps without a closure on dense gradients."""
    return inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in _NEEDS_MORE


def _takes(kind: Any, option: str) -> bool:
    parameters = inspect.signature(kind).parameters
    return option in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _torch_options(kind: Any, options: dict[str, Any], path: str) -> dict[str, Any]:
    """The options under torch's names."""
    options = dict(options)
    for other, name in OTHER_NAMES.items():
        if other in options:
            if name in options:
                raise ConfigError(path, f"{other} beside {name}", "one of the two", "lr: 1.0e-3")
            options[name] = options.pop(other)
    # An option of the Model Zoo's AdamW.
    is_foreign = "correct_bias" in options and not _takes(kind, "correct_bias")
    if is_foreign and options.pop("correct_bias") is not True:
        where = join_path(path, "correct_bias")
        raise ConfigError(where, "false", "true, as torch always corrects the bias", "correct_bias: true")
    return {key: _as_torch_takes_it(kind, key, value, path) for key, value in options.items()}


def _as_torch_takes_it(kind: Any, key: str, value: Any, path: str) -> Any:
    """A list as a tuple; where the class has a number by default, text that spells one as that number."""
    where = join_path(path, key)
    if isinstance(value, list):
        return tuple(read_number(item, join_path(where, f"[{index}]")) for index, item in enumerate(value))
    parameter = inspect.signature(kind).parameters.get(key)
    if parameter is None or type(parameter.default) not in (int, float) or not isinstance(value, str):
        return value
    # torch would compare the text with a number, and its error names no option.
    number = read_number(value, where)
    if isinstance(number, str):
        raise ConfigError(
            where, shorten(value), f"a number{share_hint(value)}", f"{key}: {parameter.default}"
        )
    return number


def _scale(groups: list[dict[str, Any]], options: Mapping[str, Any], kind: Any, path: str) -> None:
    """Gives groups with a scale their learning rate; a schedule of rarefy keeps to it later."""
    rate = options.get("lr", getattr(inspect.signature(kind).parameters.get("lr"), "default", None))
    for group in groups:
        if SCALE_KEY not in group:
            continue
        if not isinstance(rate, int | float):
            allowed = "an optimizer with a learning rate in numbers where learning rates are scaled"
            raise ConfigError(path, "no lr", allowed, "lr: 1.0e-3")
        group["lr"] = rate * group[SCALE_KEY]


def _mark(groups: list[dict[str, Any]], model: nn.Module, densities: Mapping[str, float]) -> None:
    """Notes the density that a group's learning rate was divided by, which SµPar asks an optimizer for."""
    found = {parameter: densities[name] for name, parameter in model.named_parameters() if name in densities}
    for group in groups:
        density = found.get(group["params"][0], 1.0)
        if density != 1.0:
            group[DENSITY_KEY] = density


def _implementation(kind: Any, model: nn.Module, options: Mapping[str, Any]) -> dict[str, Any]:
    """Torch's fused step where it is to be had and the user asks for no other.

    Three to four times faster than the default one on a CPU, which in sparse training also suffers from slow
    square roots of zeros.
    """
    chosen = options.keys() & {"fused", "foreach", "capturable", "differentiable"}
    devices = {parameter.device.type for parameter in model.parameters()}
    # Of a model that is cut torch takes the fused steps of Adam alone.
    kinds = _FUSED_IN_PIECES if any(map(is_cut, model.parameters())) else _FUSED
    is_possible = kind in kinds and devices <= {"cpu", "cuda"} and not chosen
    return {"fused": True} if is_possible else {}


def _construct(
    kind: Any,
    groups: list[dict[str, Any]],
    options: dict[str, Any],
    implementation: dict[str, Any],
    path: str,
) -> Optimizer:
    parameters = inspect.signature(kind).parameters
    for key in options:
        if not _takes(kind, key) or key == "params":
            known = [name for name in parameters if name != "params"]
            raise ConfigError(path, f"the key {key!r}", f"a known key ({did_you_mean(key, known)})")
    try:
        optimizer = kind(groups, **options, **implementation)
    except (TypeError, ValueError, LookupError) as error:
        raise ConfigError(path, shorten(options), f"what {kind.__name__} takes ({error})") from error
    if not isinstance(optimizer, Optimizer):
        raise ConfigError(path, shorten(optimizer), "something that returns a torch.optim.Optimizer")
    return optimizer
