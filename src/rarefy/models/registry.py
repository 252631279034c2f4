"""From the `model` map of a configuration to a module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from rarefy.decoder.decoder_config import GPTConfig, ParallelConfig
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.imports import import_object, is_import_path
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face import is_hugging_face, wrap
from rarefy.models.zoo_keys import SILENT, SPELLINGS, read_zoo_keys
from rarefy.validation import build, shorten

_SEQUENTIAL = (
    "gpt2",
    "gpt3",
    "llama",
    "mistral",
    "mixtral",
    "bloom",
    "btlm",
    "gemma2",
    "jais",
    "santacoder",
    "starcoder",
)
_PARALLEL = ("gptj", "falcon")
MODELS: Mapping[str, tuple[type[GPTConfig], Callable[[GPTConfig], nn.Module]]] = MappingProxyType(
    {name: (GPTConfig, GPTModel) for name in _SEQUENTIAL}
    | {name: (ParallelConfig, GPTModel) for name in _PARALLEL}
)


def build_model(
    config: Mapping[str, Any],
    *,
    base_dir: Path | None = None,
    allow_imports: bool = True,
    path: str = "trainer.init.model",
) -> nn.Module:
    """The model that a configuration describes.

    Args:
        config: `name` (a key of `MODELS`, or an import path of a callable that returns a module) and the
            arguments. For a class of Transformers the argument `config` is a map, from which its
            `config_class` is built.
        base_dir: where `./file.py:Class` is looked up; None is the working directory.
        allow_imports: False refuses import paths.
        path: where the map stands in the user's file; used in errors.

    Returns:
        A module whose `forward` takes a batch.

    Raises:
        ConfigError: no name, an unknown name or key, a wrong value, or a callable that fails or returns
            something else.

    Example:
        >>> sizes = {"vocab_size": 256, "hidden_size": 8, "num_heads": 2, "filter_size": 16}
        >>> type(build_model({"name": "gpt3", "num_hidden_layers": 1, **sizes})).__name__
        'GPTModel'
    """
    name, arguments = _split(config, path)
    if is_import_path(name):
        where = join_path(path, "name")
        factory = import_object(name, path=where, base_dir=base_dir, allow_imports=allow_imports)
        return _call(factory, name, arguments, path)
    if name.lower() not in MODELS:
        allowed = f"a model name or package.module:Class ({did_you_mean(name, MODELS)})"
        raise ConfigError(join_path(path, "name"), repr(name), allowed, "name: gpt3")
    kind, factory = MODELS[name.lower()]
    try:
        return factory(build(kind, read_zoo_keys(arguments)))
    except ConfigError as error:
        raise error.under(path) from None


def known_keys(name: str) -> frozenset[str] | None:
    """The keys of a registered model in any case, other spellings included; None for another name.

    Example:
        >>> known_keys("no_such_model") is None, "hidden_size" in (known_keys("GPT3") or ())
        (True, True)
    """
    if name.lower() not in MODELS:
        return None
    return frozenset(MODELS[name.lower()][0].model_fields) | SPELLINGS.keys() | SILENT.keys()


def _split(config: Mapping[str, Any], path: str) -> tuple[str, dict[str, Any]]:
    if not isinstance(config, Mapping):
        raise ConfigError(path, shorten(config), "a map with a name", "{name: gpt3, hidden_size: 768}")
    if not isinstance(config.get("name"), str):
        given = shorten(config["name"]) if "name" in config else "a model without a name"
        allowed = "a model name or package.module:Class"
        raise ConfigError(join_path(path, "name"), given, allowed, "name: gpt3")
    return config["name"], {key: value for key, value in config.items() if key != "name"}


def _call(factory: Any, name: str, arguments: dict[str, Any], path: str) -> nn.Module:
    if not callable(factory):
        raise ConfigError(join_path(path, "name"), f"{name} ({shorten(factory)})", "a class or a function")
    try:
        model = _build_hugging_face(factory, arguments) if is_hugging_face(factory) else factory(**arguments)
    except (TypeError, ValueError, KeyError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        given = f"{name} with these arguments ({reason})"
        raise ConfigError(path, given, "the arguments that it takes") from error
    if not isinstance(model, nn.Module):
        given = f"{name}, which returns {shorten(model)},"
        raise ConfigError(join_path(path, "name"), given, "a callable that returns a torch module")
    return model


def _build_hugging_face(kind: Any, arguments: dict[str, Any]) -> nn.Module:
    given = arguments.get("config", {})
    options = kind.config_class(**given) if isinstance(given, Mapping) else given
    return wrap(kind(**{**arguments, "config": options}))
