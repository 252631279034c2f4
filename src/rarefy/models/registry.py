"""From the `model` map of a configuration to a module, Model Zoo files' other spellings included."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from rarefy.decoder.decoder_config import GPTConfig, ParallelConfig
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.imports import import_object, is_import_path
from rarefy.models.gpt import GPTModel
from rarefy.models.hugging_face import is_hugging_face, wrap
from rarefy.validation import build, shorten

SPELLINGS: Mapping[str, str] = MappingProxyType(
    {
        "residual_dropout_rate": "dropout_rate",
        "embd_pdrop": "embedding_dropout_rate",
        "moe_params": "moe",
    }
)

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


@dataclass(frozen=True)
class Silent:
    """A key that is accepted and has no effect.

    Args:
        accepts: whether a value may stand there.
        means: what any other value would mean, and that it is not to be had here.
        allowed: what may stand there, worded for the user.
    """

    accepts: Callable[[Any], bool]
    means: str = ""
    allowed: str = ""


def _anything(value: Any) -> bool:
    return True


def _only(*values: Any) -> Callable[[Any], bool]:
    # True == 1 in Python, and a file's `0` is not its `false`.
    return lambda given: any(given == value and type(given) is type(value) for value in values)


def _default(means: str, *values: Any) -> Silent:
    allowed = " or ".join(_yaml(value) for value in values)
    return Silent(_only(*values), means, allowed)


def _yaml(value: Any) -> str:
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


_HINT = Silent(_anything)
_NULL = (None,)
SILENT: Mapping[str, Silent] = MappingProxyType(
    {
        # How the same numbers are computed; the trainer's `precision` and torch decide that here.
        "attention_kernel": _HINT,
        "attention_softmax_fp32": _HINT,
        "fold_rope_consts": _HINT,
        "use_experimental_flex_api": _HINT,
        "mixed_precision": _HINT,
        "fp16_type": _HINT,
        "dtype": _HINT,
        "use_bfloat16": _HINT,
        "compute_eval_metrics": _HINT,
        # Generation of text, which training and validation do not do.
        "start_token": _HINT,
        "loop_dim": _HINT,
        "stop_sequences": _HINT,
        "max_tokens": _HINT,
        "temperature": _HINT,
        "top_k": _HINT,
        "top_p": _HINT,
        # Only read with kinds of positions that are refused.
        "num_relative_attention_buckets": _HINT,
        # Options that must stay where the Model Zoo has them by default.
        "boundary_casting": _default("rounding activations between layers", False, None),
        "use_vsl": _default("several texts in one sequence that do not see each other", False),
        "lr_adjustment_groups": _default("own groups of learning rates", None),
        "attention_qk_norm_layer": _default("norms of queries and keys", None),
        "attention_qk_norm_eps": _HINT,
        "attention_chunk_size": _default("attention in bands", *_NULL),
        "attention_vertical_column_spacing": _default("attention to every n-th column", *_NULL),
        "attention_vertical_column_width": _default("attention to every n-th column", *_NULL),
        "fixed_sparse_attention": _default("fixed sparse attention", *_NULL),
        "use_sink_token": _default("a learned sink in every head", False),
        "extra_ffn_params": _default("variants of the feed-forward part", None, {}),
        "cross_attention_layers": _default("layers that attend to images", None, []),
        "num_extra_input_vocab_tokens": _default("tokens of images", 0),
        "memory_tokens": _default("memory tokens", None, {}),
        "memory_tokens_config": _default("memory tokens", None, {}),
        "constant_pos_embedding": _default("one position for all of an image", *_NULL),
        "position_embedding_offset": _default("positions that begin later", 0),
        "rel_distance_mode": _default("capped or grouped distances", "default"),
        "rel_distance_extra_args": _default("capped or grouped distances", None, {}),
        "use_ff_layer1_dropout": _default("dropout between the feed-forward layers", False),
        "mixture": _default("a mixture of data sets", *_NULL),
    }
)


def read_zoo_keys(given: Mapping[str, Any]) -> dict[str, Any]:
    """The options under this package's names, without those that have no effect.

    Args:
        given: the `model` map of a file, without `name`.

    Raises:
        ConfigError: a value that asks for what the decoder does not have, or one thing under two names.

    Example:
        >>> read_zoo_keys({"residual_dropout_rate": 0.0, "fold_rope_consts": True})
        {'dropout_rate': 0.0}
    """
    options: dict[str, Any] = {}
    for key, value in given.items():
        name = SPELLINGS.get(key, key)
        if name != key and given.get(name, value) != value:
            raise ConfigError(key, f"the key beside {name}, which is the same", "one of the two")
        if name not in SILENT:
            options[name] = value
        elif not SILENT[name].accepts(value):
            silent = SILENT[name]
            allowed = f"{silent.allowed} (rarefy's decoder does not have {silent.means})"
            raise ConfigError(key, _yaml(value), allowed)
    return options


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
