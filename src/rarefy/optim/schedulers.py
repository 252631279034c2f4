"""From the `schedulers:` block to torch schedulers; the classes are in `lr_schedules` and `lr_sequences`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.optim import Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.imports import import_object, is_import_path
from rarefy.optim import lr_schedules, lr_sequences
from rarefy.optim.lr_schedules import LRSchedule
from rarefy.validation import shorten
from rarefy.validation.block import read_block

SchedulerFactory = Callable[[Optimizer], LRScheduler]

SCHEDULES: Mapping[str, type[LRSchedule]] = {
    kind.__name__: kind
    for kind in (
        lr_schedules.ConstantLR,
        lr_schedules.LinearLR,
        lr_schedules.PolynomialLR,
        lr_schedules.CosineDecayLR,
        lr_schedules.CosineAnnealingLR,
        lr_schedules.CosineAnnealingWarmRestarts,
        lr_schedules.ExponentialLR,
        lr_schedules.InverseExponentialTimeDecayLR,
        lr_schedules.InverseSquareRootDecayLR,
        lr_schedules.StepLR,
        lr_sequences.MultiStepLR,
        lr_sequences.PiecewiseConstantLR,
        lr_sequences.SequentialLR,
    )
}
TORCH_SCHEDULERS: Mapping[str, type[LRScheduler]] = {
    kind.__name__: kind for kind in (lr_scheduler.CyclicLR, lr_scheduler.OneCycleLR)
}
_TRANSPARENT = "ScalePerParamLR"
_EXAMPLE = "- CosineDecayLR: {initial_learning_rate: 1.0e-3, end_learning_rate: 0.0, total_iters: 1000}"


def read_schedulers(
    config: Any, path: str = "schedulers", *, base_dir: Path | None = None, allow_imports: bool = True
) -> list[SchedulerFactory]:
    """Checks a `schedulers:` block.

    Args:
        config: a list of maps from one scheduler to its options, or one map; None for none.
        path: where it stands in the user's file.
        base_dir: folder that `./file.py:Name` import paths start from.
        allow_imports: whether import paths may be followed.

    Returns:
        A factory for each, to be called with the optimizer; for the schedules of rarefy, a `LRSchedule`.

    Raises:
        ConfigError: an unknown scheduler, an option that is not allowed, or two schedules that would both
            set the learning rate.

    Example:
        >>> [schedule] = read_schedulers({"constantlr": {"learning_rate": 0.1}})
        >>> schedule
        ConstantLR(total_iters=None, learning_rate=0.1)
    """
    if isinstance(config, Mapping):
        config = [{name: options} for name, options in config.items()]
    if config is not None and (not isinstance(config, Sequence) or isinstance(config, str)):
        raise ConfigError(path, shorten(config), "a list of maps from one scheduler to its options", _EXAMPLE)
    read = partial(_read_one, base_dir=base_dir, allow_imports=allow_imports)
    factories = [read(one, join_path(path, f"[{index}]")) for index, one in enumerate(config or [])]
    # Each sets the rate outright, so only the last would count.
    if sum(isinstance(factory, LRSchedule) for factory in factories) > 1:
        allowed = "one of them, or all of them inside SequentialLR"
        raise ConfigError(path, "more than one schedule that sets the learning rate", allowed)
    return factories


def build_schedulers(config: Any, optimizer: Optimizer, path: str = "schedulers") -> list[LRScheduler]:
    """The torch schedulers of a `schedulers:` block, applied to an optimizer.

    Args:
        config: a list of maps from one scheduler to its options, or one map; None for none.
        optimizer: whose learning rate they set.
        path: where the block stands in the user's file.

    Raises:
        ConfigError: as `read_schedulers`, or options that torch refuses.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
        >>> [scheduler] = build_schedulers([{"ConstantLR": {"learning_rate": 0.1}}], optimizer)
        >>> scheduler.get_last_lr()
        [0.1]
    """
    return [factory(optimizer) for factory in read_schedulers(config, path)]


def first_learning_rate(factories: Sequence[SchedulerFactory]) -> float | None:
    """The learning rate of the first step, if schedules of rarefy decide it.

    Example:
        >>> first_learning_rate(read_schedulers({"ConstantLR": {"learning_rate": 0.1}}))
        0.1
    """
    return next((factory.rate(0) for factory in factories if isinstance(factory, LRSchedule)), None)


def _read_one(given: Any, path: str, *, base_dir: Path | None, allow_imports: bool) -> SchedulerFactory:
    if not isinstance(given, Mapping) or len(given) != 1:
        raise ConfigError(path, shorten(given), "a map from one scheduler to its options", _EXAMPLE)
    [(name, options)] = given.items()
    here = join_path(path, str(name))
    options = {} if options is None else options
    if not isinstance(options, Mapping):
        raise ConfigError(here, shorten(options), "a map of options", _EXAMPLE)
    if is_import_path(str(name)):
        found = import_object(str(name), path=here, base_dir=base_dir, allow_imports=allow_imports)
        return partial(_construct, found, dict(options), here)
    if str(name).lower() == _TRANSPARENT.lower():
        return _read_wrapped(options, here, base_dir=base_dir, allow_imports=allow_imports)
    schedule = _find(SCHEDULES, str(name))
    if schedule is not None:
        nested = partial(_read_one, base_dir=base_dir, allow_imports=allow_imports)
        return read_block(schedule, _with_nested(options, here, nested), here)
    kind = _find(TORCH_SCHEDULERS, str(name))
    if kind is None:
        hint = did_you_mean(str(name), [*SCHEDULES, *TORCH_SCHEDULERS, _TRANSPARENT])
        raise ConfigError(path, name, f"a known scheduler ({hint})", _EXAMPLE)
    return partial(_construct, kind, dict(options), here)


def _read_wrapped(
    options: Mapping[str, Any], path: str, *, base_dir: Path | None, allow_imports: bool
) -> SchedulerFactory:
    """The schedule inside `ScalePerParamLR`: every schedule of rarefy scales the rates of groups that ask for it."""
    if set(options) != {"scheduler"}:
        example = "{scheduler: {ConstantLR: {learning_rate: 1.0e-3}}}"
        raise ConfigError(path, shorten(dict(options)), "a map with the one key scheduler", example)
    where = join_path(path, "scheduler")
    return _read_one(options["scheduler"], where, base_dir=base_dir, allow_imports=allow_imports)


def _find(known: Mapping[str, Any], name: str) -> Any:
    return {key.lower(): kind for key, kind in known.items()}.get(name.lower())


def _with_nested(options: Mapping[str, Any], path: str, read: Callable[[Any, str], Any]) -> dict[str, Any]:
    """The options of a sequence with the schedules inside it built."""
    inner = options.get("schedulers")
    if not isinstance(inner, Sequence) or isinstance(inner, str):
        return dict(options)
    built = []
    for index, one in enumerate(inner):
        here = join_path(path, f"schedulers[{index}]")
        schedule = one if isinstance(one, LRSchedule) else read(one, here)
        if not isinstance(schedule, LRSchedule):
            raise ConfigError(here, shorten(one), f"one of {', '.join(SCHEDULES)}", _EXAMPLE)
        built.append(schedule)
    return {**options, "schedulers": built}


def _construct(
    kind: Callable[..., Any], options: Mapping[str, Any], path: str, optimizer: Optimizer
) -> LRScheduler:
    try:
        inspect.signature(kind).bind(optimizer, **options)
        scheduler = kind(optimizer, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(path, shorten(options), f"what {kind.__name__} takes ({error})") from error
    if not isinstance(scheduler, LRScheduler):
        raise ConfigError(path, shorten(scheduler), "something that returns a torch LRScheduler")
    return scheduler
