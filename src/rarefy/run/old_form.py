"""The older form of a file (`train_input`, `model`, `optimizer`, `runconfig`, `sparsity`) as the new one."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from rarefy.data.registry import known_keys
from rarefy.errors import ConfigError
from rarefy.imports import is_import_path
from rarefy.validation import shorten
from rarefy.yaml_files.yaml_file import load_file

log = logging.getLogger("rarefy")

_INPUTS = {"train_input": "train_dataloader", "eval_input": "val_dataloader"}
_TO_PRECISION = (
    "loss_scaling_factor",
    "initial_loss_scale",
    "steps_per_increase",
    "min_loss_scale",
    "max_loss_scale",
    "max_gradient_norm",
    "max_gradient_value",
    "log_loss_scale",
)
_NOTES = ("description", "csconfig")
_SUMMARIES = frozenset({"log_summaries", "ws_summary", "tf_summary", "add_summaries"})
_LOOP = (
    "num_steps",
    "max_steps",
    "num_epochs",
    "steps_per_epoch",
    "eval_steps",
    "eval_frequency",
    "grad_accum_steps",
)
_RUNCONFIG: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "checkpoint_steps": ("checkpoint", "steps"),
        "save_initial_checkpoint": ("checkpoint", "save_initial_checkpoint"),
        "autoload_last_checkpoint": ("checkpoint", "autoload_last_checkpoint"),
        "disable_strict_checkpoint_loading": ("checkpoint", "disable_strict_checkpoint_loading"),
        "max_checkpoints": ("checkpoint", "keep_last"),
        "keep_checkpoints": ("checkpoint", "keep_last"),
        "log_steps": ("logging", "log_steps"),
        "logging": ("logging", "log_level"),
        **{key: ("loop", key) for key in _LOOP},
    }
)
# Keys that only gptj and falcon have; the files of that time do not name their model.
_OF_PARALLEL = frozenset({"residual_dropout_rate", "use_untied_layer_norm"})


def is_old(content: Mapping[str, Any]) -> bool:
    """Whether a file without `trainer` has the blocks of the older form.

    Example:
        >>> is_old({"model": {}, "runconfig": {}}), is_old({"trianer": {}})
        (True, False)
    """
    blocks = {"runconfig", "train_input", "eval_input", "model", "optimizer"}
    return "trainer" not in content and not content.keys().isdisjoint(blocks)


def in_new_form(content: dict[str, Any], name: str = "the file") -> dict[str, Any]:
    """`content`, converted where it has the older form; one line says so.

    Args:
        content: a configuration as plain data; it stays as it is.
        name: what to call it.

    Raises:
        ConfigError: as for `new_form`.
    """
    if not is_old(content):
        return content
    converted, dropped = new_form(content)
    without = f"; left out, no use for {', '.join(dropped)}" if dropped else ""
    log.warning(
        "%s has the older form and runs as its new one, which `rarefy convert` writes%s", name, without
    )
    return converted


def convert_file(path: Path, output: Path | None = None, force: bool = False) -> str:
    """The new form of an older file as YAML text; what was left out stands above it as a comment.

    Args:
        path: the older file.
        output: where to write the text; None for nowhere.
        force: whether a file that exists there is replaced.

    Raises:
        YamlError: the file cannot be read.
        ConfigError: it has the new form already or cannot be converted, or the output exists.
    """
    content = load_file(path)
    if not is_old(content):
        raise ConfigError(
            "", f"{path}, which does not have the older form,", "a file with model and runconfig"
        )
    if output is not None and output.exists() and not force:
        raise ConfigError(
            "--output", f"{output}, which exists,", "a file that does not exist yet, or --force"
        )
    converted, dropped = new_form(content)
    note = f"# left out, no use for {', '.join(dropped)}\n" if dropped else ""
    text = note + as_yaml(converted)
    if output is not None:
        output.write_text(text, encoding="utf-8")
    return text


def as_yaml(content: Mapping[str, Any]) -> str:
    """A configuration as YAML text, keys in their order."""
    return yaml.safe_dump(dict(content), sort_keys=False, width=120)


def new_form(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The older form of a file rewritten with `trainer`.

    Args:
        content: the file as plain data; it stays as it is.

    Returns:
        The new form, and the keys that have no place in it.

    Raises:
        ConfigError: a block that is no mapping, a learning rate or a name pattern that cannot be converted, or a
            block that the older form does not have.

    Example:
        >>> new_form({"model": {"name": "gpt2"}, "runconfig": {"max_steps": 5}})[0]
        {'trainer': {'init': {'model': {'name': 'gpt2'}, 'loop': {'max_steps': 5}}}}
    """
    _check_kind(content)
    dropped = [name for name in content if name in _NOTES]
    blocks = {name: _block(content, name) for name in content if name not in ("sparsity", *_NOTES)}
    init: dict[str, Any] = {}
    _take_model(blocks.pop("model", {}), init, dropped)
    _take_optimizer(blocks.pop("optimizer", {}), init, dropped)
    _take_sparsity(content.get("sparsity"), init)
    fit = _take_inputs(blocks, init, dropped)
    _take_runconfig(blocks.pop("runconfig", {}), init, fit, dropped)
    for name in blocks:
        allowed = "model, optimizer, sparsity, train_input, eval_input, runconfig"
        raise ConfigError("", f"the key {name!r} in the older form of file", allowed)
    return {"trainer": {"init": init, **({"fit": fit} if fit else {})}}, dropped


def _check_kind(content: Mapping[str, Any]) -> None:
    """Refuses files of other kinds of models at once; at that time nothing but their data names them."""
    model = content.get("model")
    data = content.get("train_input") or content.get("eval_input")
    if not isinstance(data, dict) or (isinstance(model, dict) and "name" in model):
        return
    name = data.get("data_processor")
    if isinstance(name, str) and known_keys(name) is None and not is_import_path(name):
        allowed = "the data of a decoder language model (GptHDF5MapDataProcessor), or the model's name"
        raise ConfigError("train_input.data_processor", f"{name}, data of another kind of model,", allowed)


def _block(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    given = content[name]
    if not isinstance(given, dict | None):
        raise ConfigError(name, shorten(given), "a mapping")
    return dict(given or {})


def _take_model(model: dict[str, Any], init: dict[str, Any], dropped: list[str]) -> None:
    precision: dict[str, Any] = {}
    if "mixed_precision" in model:
        precision["enabled"] = bool(model.pop("mixed_precision"))
    if model.get("fp16_type") is not None:
        precision["fp16_type"] = model["fp16_type"]
    model.pop("fp16_type", None)
    dropped += [f"model.{key}" for key in model if key in _SUMMARIES]
    kept = {
        key: value for key, value in model.items() if key not in _SUMMARIES and key != "alibi_implementation"
    }
    # Its name in files of that time.
    if "scale_by_layer_index" in kept:
        kept["scale_qk_dot_by_layer_idx"] = kept.pop("scale_by_layer_index")
    name = kept.pop("name", None) or ("gptj" if kept.keys() & _OF_PARALLEL else "gpt2")
    init["model"] = {"name": name, **kept}
    if precision:
        init["precision"] = precision


def _take_optimizer(options: dict[str, Any], init: dict[str, Any], dropped: list[str]) -> None:
    if not options:
        return
    name = str(options.pop("optimizer_type", "AdamW"))
    precision = {key: options.pop(key) for key in _TO_PRECISION if key in options}
    precision = {key: value for key, value in precision.items() if value is not None}
    dropped += [f"optimizer.{key}" for key in options if key in _SUMMARIES]
    kept = {key: value for key, value in options.items() if key not in _SUMMARIES}
    rate = kept.get("learning_rate")
    if isinstance(rate, dict | list):
        init["schedulers"] = _schedulers(rate if isinstance(rate, list) else [rate])
        kept.pop("learning_rate")
    init["optimizer"] = {name: kept}
    if precision:
        init["precision"] = {**init.get("precision", {}), **precision}


def _schedulers(stages: list[Any]) -> list[dict[str, Any]]:
    built = [_scheduler(stage, f"optimizer.learning_rate[{index}]") for index, stage in enumerate(stages)]
    return built if len(built) == 1 else [{"SequentialLR": {"schedulers": built}}]


def _scheduler(given: Any, path: str) -> dict[str, Any]:
    if not isinstance(given, dict) or not isinstance(given.get("scheduler"), str):
        raise ConfigError(
            path, shorten(given), "a mapping with scheduler", "{scheduler: Linear, total_iters: 100}"
        )
    options = {key: value for key, value in given.items() if key != "scheduler"}
    for old, new in (("steps", "total_iters"), ("val", "learning_rate")):
        if old in options:
            options[new] = options.pop(old)
    name = given["scheduler"]
    return {name if name.endswith(("LR", "Restarts")) else f"{name}LR": options}


def _take_sparsity(given: Any, init: dict[str, Any]) -> None:
    if given is None:
        return
    entries = given if isinstance(given, list) else [given]
    converted = [_sparsity(entry) if isinstance(entry, dict) else entry for entry in entries]
    init["sparsity"] = converted if isinstance(given, list) else converted[0]
    if any(isinstance(entry, dict) and entry.get("add_summaries") for entry in entries):
        init.setdefault("callbacks", []).append({"LogSparsity": {}})


def _sparsity(given: dict[str, Any]) -> dict[str, Any]:
    entry = {key: value for key, value in given.items() if key not in _SUMMARIES}
    if "type" in entry:
        entry.setdefault("algorithm", entry.pop("type"))
    schedule = entry.get("schedule")
    # At that time `schedule` was when masks change; today it is another word for `sparsity`.
    if (
        "update" not in entry
        and isinstance(schedule, dict)
        and schedule.keys() & {"freq", "start", "stop", "steps"}
    ):
        entry["update"] = entry.pop("schedule")
    if "param_name_patterns" in entry:
        patterns = entry.pop("param_name_patterns")
        listed = patterns if isinstance(patterns, list) else [patterns]
        entry["param_filter"] = [_glob(pattern) for pattern in listed]
    return entry


def _glob(pattern: Any) -> str:
    """A regular expression of names as a glob, where it is one of the simple ones that files have."""
    # Escaped dots are set aside, while the others become wildcards.
    text = (
        str(pattern)
        .removeprefix("^")
        .replace("\\.", "\0")
        .replace(".*", "*")
        .replace(".", "?")
        .replace("\0", ".")
    )
    # Dots between words are meant as dots: `proj_q_dense_layer.weight`.
    text = re.sub(r"(?<=\w)\?(?=\w)", ".", text)
    if re.search(r"[\\|(){}+^]|\?(?!\w)", text.removesuffix("$")):
        allowed = "a glob as sparsity.param_filter instead"
        raise ConfigError("sparsity.param_name_patterns", repr(pattern), allowed, "'*linear_layer.weight'")
    text = text[:-1] if text.endswith("$") else f"{text.rstrip('*')}*" if text.endswith("*") else text
    return text if text.startswith("*") else f"*{text}"


def _take_inputs(blocks: dict[str, Any], init: dict[str, Any], dropped: list[str]) -> dict[str, Any]:
    fit: dict[str, Any] = {}
    for old, new in _INPUTS.items():
        if old in blocks:
            options = blocks.pop(old)
            dropped += [f"{old}.{key}" for key in ("num_examples",) if key in options]
            size = options.pop("micro_batch_size", None)
            if size is not None and old == "train_input":
                init.setdefault("loop", {})["micro_batch_size"] = size
            elif size is not None:
                dropped.append(f"{old}.micro_batch_size")
            fit[new] = {key: value for key, value in options.items() if key != "num_examples"}
    return fit


def _take_runconfig(
    given: dict[str, Any], init: dict[str, Any], fit: dict[str, Any], dropped: list[str]
) -> None:
    for key, value in given.items():
        if key in _RUNCONFIG:
            block, name = _RUNCONFIG[key]
            init.setdefault(block, {})[name] = value
        elif key in ("seed", "model_dir"):
            init[key] = value
        elif key == "target_device":
            init["device"] = value
        elif key == "checkpoint_path" and value is not None:
            fit["ckpt_path"] = value
        elif key == "load_checkpoint_states":
            init.setdefault("callbacks", []).append({"LoadCheckpointStates": {key: value}})
        # The mode is the command's to say, and a path of null says nothing.
        elif key not in ("mode", "checkpoint_path"):
            dropped.append(f"runconfig.{key}")
