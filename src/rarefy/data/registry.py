"""From a dataloader's map in a configuration to a loader."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rarefy.data.digits import DigitsDataProcessor
from rarefy.data.hdf5 import GptHDF5DataProcessor, GptHDF5MapDataProcessor
from rarefy.data.loader import DataProcessor
from rarefy.data.text_corpus import TextCorpusDataProcessor
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.imports import import_object, is_import_path
from rarefy.validation import build, shorten

DATA_PROCESSORS: Mapping[str, type[DataProcessor]] = MappingProxyType(
    {
        "TextCorpusDataProcessor": TextCorpusDataProcessor,
        "GptHDF5MapDataProcessor": GptHDF5MapDataProcessor,
        "GptHDF5DataProcessor": GptHDF5DataProcessor,
        "DigitsDataProcessor": DigitsDataProcessor,
    }
)


def build_dataloader(
    config: Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    allow_imports: bool = True,
    path: str = "trainer.fit.train_dataloader",
    default_seed: int | None = None,
) -> Iterable[Any]:
    """The loader that a configuration describes.

    Args:
        config: `data_processor` (a name, or an import path of a function that returns an iterable) and the
            processor's keys or the function's arguments.
        base_dir: where `./file.py:function` is looked up; None is the working directory.
        allow_imports: False refuses import paths.
        path: where the map stands in the user's file; used in errors.
        default_seed: the processor's seed unless the map gives one; None is the processor's own default.

    Returns:
        A `ResumableDataLoader` for a name, else what the function returns.

    Raises:
        ConfigError: no name, an unknown name or key, a wrong value, data that cannot be used, or a function
            that fails or returns something else.

    Example:
        >>> keys = {"sequence_length": 64, "batch_size": 8, "split": "validation"}
        >>> loader = build_dataloader({"data_processor": "TextCorpusDataProcessor", **keys})
        >>> len(loader) > 10
        True
    """
    name, arguments = _split(config, path)
    where = join_path(path, "data_processor")
    if is_import_path(name):
        function = import_object(name, path=where, base_dir=base_dir, allow_imports=allow_imports)
        return _call(function, name, arguments, path)
    processor = _find(name, where)
    options = build(processor.config_class, arguments, path=path)
    key = processor.seed_key
    # Only where the file gives none; null, which one processor takes, says no more.
    if default_seed is not None and (key not in options.model_fields_set or getattr(options, key) is None):
        options = options.model_copy(update={key: default_seed})
    try:
        return processor(options).create_dataloader()
    except ConfigError as error:
        raise error.under(path) from error


def known_keys(name: str) -> frozenset[str] | None:
    """The keys of a registered data processor in any case; None for another name.

    Example:
        >>> "data_dir" in (known_keys("GptHDF5MapDataProcessor") or ())
        True
    """
    processor = {known.lower(): kind for known, kind in DATA_PROCESSORS.items()}.get(name.lower())
    return None if processor is None else frozenset(processor.config_class.model_fields)


def _split(config: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    example = "data_processor: TextCorpusDataProcessor"
    if not isinstance(config, Mapping):
        raise ConfigError(path, shorten(config), "a map with a data_processor", example)
    name = config.get("data_processor")
    if not isinstance(name, str):
        given = "a dataloader without one" if name is None else shorten(name)
        allowed = "the name of a data processor or package.module:function"
        raise ConfigError(join_path(path, "data_processor"), given, allowed, example)
    return name, {key: value for key, value in config.items() if key != "data_processor"}


def _find(name: str, path: str) -> type[DataProcessor]:
    for known, processor in DATA_PROCESSORS.items():
        if known.lower() == name.lower():
            return processor
    hint = did_you_mean(name, DATA_PROCESSORS)
    allowed = f"the name of a data processor or package.module:function ({hint})"
    raise ConfigError(path, repr(name), allowed)


def _check_seeds(arguments: Mapping[str, Any], path: str) -> None:
    """Torch takes whole seeds only, and says so when the first batch is read, long after the file was checked."""
    for key, value in arguments.items():
        if isinstance(value, float) and (key == "seed" or key.endswith("_seed")):
            raise ConfigError(join_path(path, key), shorten(value), "a whole number ≥ 0", f"{key}: 1")


def _call(function: Any, name: str, arguments: dict[str, Any], path: str) -> Iterable[Any]:
    where = join_path(path, "data_processor")
    _check_seeds(arguments, path)
    if not callable(function):
        raise ConfigError(where, f"{name} ({shorten(function)})", "a function that returns an iterable")
    try:
        loader = function(**arguments)
    # Arguments that do not fit; anything else is a fault of the function, whose traceback its author needs.
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        given = f"{name} with these arguments ({reason})"
        raise ConfigError(path, given, "the arguments that it takes") from error
    if not isinstance(loader, Iterable):
        given = f"{name}, which returns {shorten(loader)},"
        raise ConfigError(where, given, "a function that returns an iterable")
    return loader
