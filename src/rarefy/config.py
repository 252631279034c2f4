"""The `sparsity:` block: from what a user writes to algorithms, every mistake named with its path."""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Any

from rarefy.algorithms.base import Sparsifier, SparsityAlgorithm
from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.group import Group
from rarefy.algorithms.option_checks import parse_fraction
from rarefy.algorithms.options import options_of
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.filters import check_filter
from rarefy.imports import import_object
from rarefy.methods.registry import ALGORITHMS
from rarefy.patterns import Pattern, parse_pattern
from rarefy.patterns.structures import NOfM
from rarefy.schedules import Constant, Cycling, step_keys, update_steps
from rarefy.validation import StepMark, shorten
from rarefy.validation.numerals import percent_in, read_number, share_hint

# The Model Zoo's names.
_ALIASES = {"type": "algorithm", "schedule": "sparsity"}


@dataclass(frozen=True)
class _Context:
    """What the rest of the run knows and the block may need."""

    num_steps: int | None
    seed: int | None
    base_dir: Path | None
    allow_imports: bool


@dataclass(frozen=True)
class _Entry:
    """One algorithm to be: its options, and where each of them was written."""

    options: Mapping[str, Any]
    path: str
    overlay: Mapping[str, Any]
    overlay_path: str

    def where(self, option: str) -> str:
        """The path of the mapping in which an option was written."""
        return self.overlay_path if option in self.overlay else self.path


def configure(
    block: Any,
    *,
    num_steps: int | None = None,
    seed: int | None = None,
    path: str = "sparsity",
    base_dir: Path | None = None,
    allow_imports: bool = True,
) -> Sparsifier:
    """Algorithms from a `sparsity:` block.

    Args:
        block: a number (static), a dict of options, a list of dicts (a group), or a ready-made algorithm.
        num_steps: optimizer steps of the run, ≥ 1, if known; then steps may be given as `"75%"`.
        seed: for entries that name none.
        path: where the block stands in the user's file, for messages.
        base_dir: folder that `./file.py:Name` import paths start from.
        allow_imports: whether import paths in the block may be followed.

    Raises:
        ConfigError: anything that is not allowed, with its path.

    Example:
        >>> configure({"algorithm": "rigl", "sparsity": 0.9, "update": {"freq": 100}}).name
        'rigl'
    """
    if isinstance(block, Sparsifier):
        return block
    context = _Context(num_steps, seed, base_dir, allow_imports)
    entries, grouped = _entries(block, path)
    algorithms = [_build(entry, context) for entry in entries]
    return Group(algorithms) if grouped else algorithms[0]


def patterns_of(block: Any, path: str = "sparsity") -> list[tuple[tuple[str, ...] | None, Pattern]]:
    """For each entry of a `sparsity:` block its globs (None: the default filter) and its pattern.

    Nothing is imported and no algorithm is made, so that the block of a stranger's checkpoint can be read.

    Args:
        block: as for `configure`.
        path: where it stands, for messages.

    Raises:
        ConfigError: no such block, or an entry whose filter or pattern is not allowed.

    Example:
        >>> [(globs, pattern)] = patterns_of({"sparsity": 0.9, "balance_out_groups": 4})
        >>> globs, pattern.groups
        (None, 4)
    """
    options = [entry.options for entry in _entries(block, path)[0] if isinstance(entry, _Entry)]
    keys = ("balance_in_groups", "balance_out_groups")
    return [
        (
            check_filter(one.get("param_filter")),
            parse_pattern(one.get("pattern", "unstructured"), *(one.get(key) for key in keys)),
        )
        for one in options
    ]


def _entries(block: Any, path: str) -> tuple[list[_Entry | Sparsifier], bool]:
    """The entries of a block, and whether they form a group."""
    if isinstance(block, str):
        block = read_number(block, path)
    # True is a number to Python.
    if isinstance(block, Real) and not isinstance(block, bool):
        parse_fraction(block, path, below_one=True)
        return [_Entry({"sparsity": block}, path, {}, path)], False
    if isinstance(block, Mapping) and "groups" in block:
        extra = next((key for key in block if key not in ("groups", "type", "algorithm")), None)
        if extra is not None:
            raise ConfigError(path, f"the key {extra!r} beside `groups`", "it inside the entries of `groups`")
        # The one algorithm that has groups; another would be left out without a word.
        other = next(
            (key for key in ("type", "algorithm") if str(block.get(key, "group")).lower() != "group"), None
        )
        if other is not None:
            allowed = "group, and the algorithm inside each entry of `groups`"
            raise ConfigError(join_path(path, other), shorten(block[other]), allowed)
        return _list_entries(block["groups"], join_path(path, "groups")), True
    if isinstance(block, Mapping):
        options = _flattened(block, path)
        return list(_overlaid(options, path)), isinstance(options.get("param_filter"), Mapping)
    if isinstance(block, Sequence) and not isinstance(block, str):
        return _list_entries(block, path), True
    raise ConfigError(
        path,
        shorten(block),
        f"a number, a dict of options, or a list of dicts{share_hint(block)}",
        "sparsity: 0.9",
    )


def _list_entries(block: Any, path: str) -> list[_Entry | Sparsifier]:
    if not isinstance(block, Sequence) or isinstance(block, str):
        raise ConfigError(path, shorten(block), "a list of dicts")
    if not block:
        raise ConfigError(path, "an empty list", "at least one entry, or null for dense training")
    found: list[_Entry | Sparsifier] = []
    for index, item in enumerate(block):
        here = join_path(path, f"[{index}]")
        if isinstance(item, Sparsifier):
            found.append(item)
        elif isinstance(item, Mapping) and "groups" not in item:
            found += _overlaid(_flattened(item, here), here)
        else:
            raise ConfigError(here, shorten(item), "a dict of options", "{algorithm: set, sparsity: 0.9}")
    return found


def _flattened(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    """An entry without Model Zoo's inner `params` map and without aliases."""
    inner = entry.get("params", {})
    if not isinstance(inner, Mapping):
        raise ConfigError(join_path(path, "params"), shorten(inner), "a dict of options")
    options = {key: value for key, value in entry.items() if key != "params"}
    twice = next((key for key in inner if key in options), None)
    if twice is not None:
        raise ConfigError(path, f"{twice!r} both beside and inside `params`", "it once")
    return _without_aliases({**options, **inner}, path)


def _without_aliases(options: dict[str, Any], path: str) -> dict[str, Any]:
    for alias, name in _ALIASES.items():
        if alias not in options:
            continue
        if name in options:
            raise ConfigError(path, f"`{alias}` together with `{name}`", f"only `{name}`")
        if alias == "type":
            warnings.warn(
                f"{join_path(path, alias)} is deprecated; write `{name}`", FutureWarning, stacklevel=2
            )
        options = {(name if key == alias else key): value for key, value in options.items()}
    return options


def _overlaid(options: Mapping[str, Any], path: str) -> Iterator[_Entry]:
    """One entry per glob where `param_filter` is a dict; the first glob that matches a parameter wins."""
    param_filter = options.get("param_filter")
    if not isinstance(param_filter, Mapping):
        yield _Entry(options, path, {}, path)
        return
    if not param_filter:
        raise ConfigError(join_path(path, "param_filter"), "an empty dict", "at least one glob")
    for glob, overlay in param_filter.items():
        here = join_path(path, f"param_filter.{glob}")
        if overlay is not None and not isinstance(overlay, Mapping):
            raise ConfigError(here, shorten(overlay), "a dict of options, or null for no override")
        own = _without_aliases(dict(overlay or {}), here)
        # The glob itself is the filter of its entry.
        if "param_filter" in own:
            raise ConfigError(
                here, "a param_filter inside param_filter", "other options", "{balance_out_groups: 12}"
            )
        yield _Entry({**options, **own, "param_filter": glob}, path, own, here)


def _build(entry: _Entry | Sparsifier, context: _Context) -> Sparsifier:
    if not isinstance(entry, _Entry):
        return entry
    options = dict(entry.options)
    kind = _algorithm_class(options.pop("algorithm", "static"), entry, context)
    _check_keys(kind, options, entry)
    declared = options_of(kind)
    # Under these keys alone: a percentage anywhere else is a slip, which the check of its option names.
    steps = {**step_keys(), **{name: one.steps for name, one in declared.items() if one.steps is not None}}
    options = {
        key: _resolved(value, key, entry.where(key), context.num_steps, steps)
        for key, value in options.items()
    }
    if isinstance(options.get("init_method"), str) and ":" in options["init_method"]:
        options["init_method"] = _import(options["init_method"], "init_method", entry, context)
    # `seed: null` says no more than no seed.
    if options.get("seed") is None:
        options["seed"] = context.seed
    _warn_of_implied_freq(options.get("update"), entry)
    algorithm = _construct(kind, options, entry)
    # What `apply` refuses later is still named by where the option was written.
    algorithm.paths = {option: entry.where(option) for option in accepted_options(kind)}
    if context.num_steps is not None and isinstance(algorithm, DynamicSparsityAlgorithm):
        algorithm.check_run(context.num_steps)
    _warn_out_of_range(algorithm, entry, context.num_steps)
    _warn_of_idle_drops(algorithm, entry)
    return algorithm


def _algorithm_class(given: Any, entry: _Entry, context: _Context) -> type[SparsityAlgorithm]:
    path = join_path(entry.where("algorithm"), "algorithm")
    if isinstance(given, str) and ":" in given:
        given = _import(given, "algorithm", entry, context)
    elif isinstance(given, str) and given.lower() in ALGORITHMS:
        given = ALGORITHMS[given.lower()]
    if inspect.isclass(given) and issubclass(given, SparsityAlgorithm) and not inspect.isabstract(given):
        return given
    if inspect.isclass(given) and issubclass(given, SparsityAlgorithm):
        allowed = "a class that implements `update` (a SparsityAlgorithm) or `update_mask` (a DynamicSparsityAlgorithm)"
        raise ConfigError(path, given.__name__, allowed)
    hint = did_you_mean(given, ALGORITHMS) if isinstance(given, str) else f"one of {', '.join(ALGORITHMS)}"
    raise ConfigError(path, shorten(given), f"a known algorithm ({hint}) or package.module:Class of one")


def _import(spec: str, option: str, entry: _Entry, context: _Context) -> Any:
    path = join_path(entry.where(option), option)
    return import_object(spec, path=path, base_dir=context.base_dir, allow_imports=context.allow_imports)


def accepted_options(kind: type[SparsityAlgorithm]) -> list[str]:
    """The options that an algorithm's constructor takes, its bases' included.

    Example:
        >>> ["update" in accepted_options(ALGORITHMS[name]) for name in ("rigl", "static")]
        [True, False]
    """
    return list(options_of(kind))


def _check_keys(kind: type[SparsityAlgorithm], options: Mapping[str, Any], entry: _Entry) -> None:
    accepted = accepted_options(kind)
    for key in options:
        if key in accepted:
            continue
        # Spelt rightly, but another algorithm's: naming its owners helps more than a guess at the spelling.
        takers = [name for name, known in ALGORITHMS.items() if key in accepted_options(known)]
        if takers:
            what = f"`{key}` with algorithm {kind.name or kind.__name__}"
            raise ConfigError(entry.where(key), what, f"it with {', '.join(takers)} only, or leave it out")
        raise ConfigError(
            entry.where(key),
            f"the key {key!r}",
            f"a known key ({did_you_mean(str(key), [*accepted, 'algorithm'])})",
        )
    if "sparsity" in accepted and options.get("sparsity") is None:
        raise ConfigError(
            join_path(entry.path, "sparsity"),
            "a missing value",
            "a number in [0, 1) or a schedule",
            "sparsity: 0.9",
        )
    for name, option in options_of(kind).items():
        if option.default is inspect.Parameter.empty and name not in options:
            allowed = f"what {kind.name or kind.__name__} needs: {option.description.partition('. ')[0]}"
            raise ConfigError(join_path(entry.path, name), "a missing value", allowed.rstrip("."))


def _construct(kind: type[SparsityAlgorithm], options: Mapping[str, Any], entry: _Entry) -> SparsityAlgorithm:
    try:
        for name, option in options_of(kind).items():
            if name in options:
                option.check(options[name])
        return kind(**options)
    except ConfigError as error:
        # The path begins with the option, which may stand in the entry or in the overlay of its glob.
        raise error.under(entry.where(re.split(r"[.\[]", error.path)[0])) from None
    # A constructor of the user's own; ConfigError is a ValueError as well, so it comes first.
    except (TypeError, ValueError) as error:
        raise ConfigError(
            entry.path, f"{kind.__name__}: {error}", "options that its constructor takes"
        ) from error


def _resolved(value: Any, key: str, path: str, num_steps: int | None, steps: Mapping[str, StepMark]) -> Any:
    """A value with every `"75%"` that stands for a step, under a key of `steps`, replaced by that step."""
    here = join_path(path, key)
    if isinstance(value, Mapping):
        return {inner: _resolved(item, str(inner), here, num_steps, steps) for inner, item in value.items()}
    if key not in steps:
        return value
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_step(item, f"{here}[{i}]", num_steps, steps[key]) for i, item in enumerate(value)]
    return _step(value, here, num_steps, steps[key])


def _step(value: Any, path: str, num_steps: int | None, mark: StepMark) -> Any:
    percent = percent_in(value)
    if percent is None:
        return value
    if num_steps is None:
        raise ConfigError(
            path,
            shorten(value),
            "a whole number of steps; a percentage needs the length of the run, num_steps=1000",
            "75",
        )
    if percent > 100:
        raise ConfigError(path, shorten(value), 'at most "100%"', '"75%"')
    # A small share of a short run rounds to 0, where a frequency has to be 1.
    return max(round(percent / 100 * num_steps), mark.least)


def _warn_of_implied_freq(update: Any, entry: _Entry) -> None:
    if (
        isinstance(update, Mapping)
        and update.keys() & {"start", "stop"}
        and not update.keys() & {"freq", "steps"}
    ):
        where = join_path(entry.where("update"), "update")
        warnings.warn(
            f"{where} has no freq: every step is an update step; say freq: 1 if meant", stacklevel=2
        )


def _warn_out_of_range(algorithm: SparsityAlgorithm, entry: _Entry, num_steps: int | None) -> None:
    """Warns of a schedule that leaves [0, 1], or what the pattern allows, on an update step of the run."""
    for option, highest in (
        ("sparsity", algorithm.pattern.structure.highest_sparsity),
        ("drop_fraction", 1.0),
    ):
        schedule = getattr(algorithm, option, None)
        # Numbers that hold as they are were refused when they were read.
        if num_steps is None or schedule is None or isinstance(schedule, Constant | Cycling):
            continue
        steps = update_steps(algorithm.update_schedule, 0, num_steps)
        worst = next((step for step in steps if not 0.0 <= schedule(step) <= highest), None)
        if worst is not None:
            where = join_path(entry.where(option), option)
            bounds = f"[0, {highest:.4g}]"
            message = f"{where} is {schedule(worst):.4g} at step {worst}, outside {bounds}; it is clamped"
            warnings.warn(message, stacklevel=2)
            algorithm.clamped.told.append(schedule)


def _warn_of_idle_drops(algorithm: SparsityAlgorithm, entry: _Entry) -> None:
    """Warns of a drop fraction that drops nothing in groups as small as those of n of m."""
    fraction = getattr(algorithm, "drop_fraction", None)
    structure = algorithm.pattern.structure
    if (
        isinstance(fraction, Constant)
        and isinstance(structure, NOfM)
        and not round(fraction.value * structure.n)
    ):
        where = join_path(entry.where("drop_fraction"), "drop_fraction")
        # A little more than a half, which itself rounds to even, that is to none.
        enough = 0.51 / structure.n
        message = f"{where} {fraction.value:g} drops none of {structure.n} in a group of {structure.m}"
        warnings.warn(f"{message}, so masks never change; give {enough:.2g} or more", stacklevel=2)
