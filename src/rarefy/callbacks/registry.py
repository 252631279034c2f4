"""From the `callbacks:` and `loggers:` lists to objects."""

from __future__ import annotations

import importlib.util
import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from rarefy.callbacks.compute_norm import ComputeNorm
from rarefy.callbacks.events import Callback, Logger
from rarefy.callbacks.ignored import IGNORED
from rarefy.callbacks.load_checkpoint_states import LoadCheckpointStates
from rarefy.callbacks.log_sparsity import LogSparsity
from rarefy.callbacks.loggers.csv_logger import CSVLogger
from rarefy.callbacks.loggers.mlflow_logger import MLFlowLogger
from rarefy.callbacks.loggers.progress_logger import ProgressLogger
from rarefy.callbacks.loggers.tensorboard_logger import TensorBoardLogger
from rarefy.callbacks.loggers.wandb_logger import WandbLogger
from rarefy.callbacks.run_record import RunRecord
from rarefy.errors import ConfigError, did_you_mean
from rarefy.imports import import_object, is_import_path
from rarefy.validation import shorten

Kind: TypeAlias = Literal["callbacks", "loggers"]
Entry: TypeAlias = "Callback | Mapping[str, Mapping[str, Any] | None]"


@dataclass(frozen=True)
class Registered:
    """A class that a configuration names, its options, and the package, and extra, that it needs."""

    kind: type[Callback]
    options: tuple[str, ...] = ()
    package: str = ""

    @property
    def is_usable(self) -> bool:
        """Whether the package that the class needs is installed."""
        # Looked for, not imported, which may take seconds.
        return not self.package or importlib.util.find_spec(self.package) is not None


_MLFLOW = ("experiment_name", "run_name", "tracking_uri", "tags")
_WANDB = ("project", "run_name", "group", "tags", "mode", "run_id", "job_type", "resume")
REGISTRY: Mapping[Kind, Mapping[str, Registered]] = {
    "callbacks": {
        "ComputeNorm": Registered(ComputeNorm),
        "LoadCheckpointStates": Registered(LoadCheckpointStates, options=("load_checkpoint_states",)),
        "LogSparsity": Registered(LogSparsity),
        "RunRecord": Registered(RunRecord),
    },
    "loggers": {
        "CSVLogger": Registered(CSVLogger),
        "MLFlowLogger": Registered(MLFlowLogger, options=_MLFLOW, package="mlflow"),
        "ProgressLogger": Registered(ProgressLogger),
        "TensorBoardLogger": Registered(TensorBoardLogger, options=("summary_dir",), package="tensorboard"),
        "WandbLogger": Registered(WandbLogger, options=_WANDB, package="wandb"),
    },
}
DEFAULTS: Mapping[Kind, tuple[str, ...]] = {
    "callbacks": ("ComputeNorm", "RunRecord"),
    "loggers": ("ProgressLogger", "TensorBoardLogger", "CSVLogger"),
}
BASES: Mapping[Kind, type[Callback]] = {"callbacks": Callback, "loggers": Logger}
log = logging.getLogger("rarefy")


def build_callbacks(
    entries: Sequence[Entry],
    defaults: Sequence[str],
    *,
    path: str,
    kind: Kind,
    allow_imports: bool = True,
    base_dir: Path | None = None,
    leaves_out_missing: bool = False,
) -> list[Callback]:
    """The callbacks or loggers of a run: the defaults first, then the entries in their order.

    Args:
        entries: ready-made objects, or one-key maps `{Name: options}`. The name is registered (in any case)
            or an import path. An entry replaces a default of its name; `{Name: None}` removes it.
        defaults: registered names that are there without being asked for, such as `DEFAULTS[kind]`.
        path: where the list stands, such as `trainer.init.callbacks`.
        kind: `callbacks` or `loggers`.
        allow_imports: False refuses import paths.
        base_dir: where relative import paths begin.
        leaves_out_missing: whether an entry whose package is not installed is left out with one line, for files that
            were written for another system, instead of being refused.

    Raises:
        ConfigError: an unknown name or option, an object of another kind, or one whose package is not installed.

    Example:
        >>> entries = [{"LogSparsity": {}}, {"ComputeNorm": None}]
        >>> built = build_callbacks(entries, ["ComputeNorm"], path="callbacks", kind="callbacks")
        >>> [type(callback).__name__ for callback in built]
        ['LogSparsity']
    """
    source = _Source(kind, allow_imports, base_dir)
    # Nobody asked for these, so one without its package is left out, where an entry of the list is refused.
    usable = [name for name in defaults if REGISTRY[kind][name].is_usable]
    if len(usable) < len(defaults):
        missing = ", ".join(sorted({*defaults} - {*usable}))
        log.info("%s left out, its package is not installed", missing)
    chosen = {name: source.build(name, {}, path) for name in usable}
    ignored = [name for name in map(_name_of, entries) if name in IGNORED]
    absent = _absent(entries, kind) if leaves_out_missing else {}
    for index, entry in enumerate(entries):
        if _name_of(entry) not in IGNORED and _name_of(entry) not in absent:
            source.take(entry, f"{path}[{index}]", chosen)
    if ignored:
        log.warning("%s: ignored, no use for %s", path, ", ".join(map(_with_substitute, ignored)))
    for name, package in absent.items():
        log.warning("%s: %s left out; pip install 'rarefy[%s]' brings it in", path, name, package)
    return list(chosen.values())


@dataclass(frozen=True)
class _Source:
    """Where the objects of one list come from."""

    kind: Kind
    allow_imports: bool
    base_dir: Path | None

    def take(self, entry: Entry, path: str, chosen: dict[str, Callback]) -> None:
        """Adds to, replaces in or removes from `chosen` what one entry asks for."""
        if isinstance(entry, Callback):
            registered = type(entry) in [one.kind for one in REGISTRY[self.kind].values()]
            # Ready-made ones of a registered class replace the default; of a user's class there may be several.
            chosen[type(entry).__name__ if registered else path] = self._checked(entry, path)
            return
        name, options = _one_key(entry, path)
        key = path if is_import_path(name) else self._registered_name(name, path)
        if options is None:
            chosen.pop(key, None)
        else:
            chosen[key] = self.build(name, options, f"{path}.{name}")

    def build(self, name: str, options: Mapping[str, Any], path: str) -> Callback:
        """The object that a name and its options ask for."""
        if is_import_path(name):
            kind = import_object(name, path=path, base_dir=self.base_dir, allow_imports=self.allow_imports)
            return self._checked(_call(kind, options, path), path)
        found = REGISTRY[self.kind][self._registered_name(name, path)]
        if not found.is_usable:
            remedy = f"it after pip install 'rarefy[{found.package}]'"
            raise ConfigError(path, f"{name} without the package {found.package}", remedy)
        for key in options:
            if key not in found.options:
                allowed = f"one of {', '.join(found.options)}" if found.options else "no options"
                raise ConfigError(path, f"the key {key!r}", allowed, f"{name}: {{}}")
        return _call(found.kind, options, path)

    def _registered_name(self, name: str, path: str) -> str:
        """The spelling of the registry, whatever the case."""
        known = {spelling.lower(): spelling for spelling in REGISTRY[self.kind]}
        if name.lower() in known:
            return known[name.lower()]
        for other, registered in REGISTRY.items():
            if name.lower() in map(str.lower, registered):
                raise ConfigError(path, f"{name!r} among the {self.kind}", f"it under {other}")
        hint = did_you_mean(name, known.values())
        raise ConfigError(path, repr(name), f"a known name ({hint}) or an import path package.module:Class")

    def _checked(self, built: Any, path: str) -> Callback:
        base = BASES[self.kind]
        if not isinstance(built, base):
            raise ConfigError(
                path, f"a {type(built).__name__}", f"a subclass of rarefy.callbacks.{base.__name__}"
            )
        # It is a callback too, but among these it would never be given a metric.
        if self.kind == "callbacks" and isinstance(built, Logger):
            raise ConfigError(
                path, f"the logger {type(built).__name__} among the callbacks", "it under loggers"
            )
        return built


def _call(kind: Any, options: Mapping[str, Any], path: str) -> Any:
    if not callable(kind):
        raise ConfigError(path, shorten(kind), "a class")
    try:
        inspect.signature(kind).bind(**options)
        return kind(**options)
    # A ValueError too, so it comes first.
    except ConfigError as error:
        raise error.under(path) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(path, shorten(dict(options)), f"other options ({error})") from error


def _one_key(entry: Any, path: str) -> tuple[str, Mapping[str, Any] | None]:
    if isinstance(entry, Mapping) and len(entry) == 1:
        [(name, options)] = entry.items()
        if isinstance(name, str) and (options is None or isinstance(options, Mapping)):
            return name, options
    raise ConfigError(path, shorten(entry), "a map of one name to its options", "LogSparsity: {}")


def _name_of(entry: Any) -> str:
    return next(iter(entry)) if isinstance(entry, Mapping) and len(entry) == 1 else ""


def _absent(entries: Sequence[Entry], kind: Kind) -> dict[str, str]:
    """The names, as they are written, of registered classes that are asked for without their package; the packages."""
    known = {spelling.lower(): one for spelling, one in REGISTRY[kind].items() if not one.is_usable}
    names = [name for name in map(_name_of, entries) if isinstance(name, str)]
    return {name: known[name.lower()].package for name in names if name.lower() in known}


def _with_substitute(name: str) -> str:
    return f"{name} (instead: {IGNORED[name]})" if IGNORED[name] else name
