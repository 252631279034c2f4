"""What files written for Cerebras' Model Zoo hold and rarefy has no use for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

_CLUSTER_KEYS = frozenset(
    [
        "artifact_dir",
        "cluster_config",
        "compile_dir",
        "compile_only",
        "drop_data",
        "fabric_type_blacklist",
        "job_labels",
        "job_time_sec",
        "launch_args",
        "lazy_initialization",
        "log_initialization",
        "max_act_per_csx",
        "max_checkpoints",
        "max_wgt_servers",
        "micro_batch_size",
        "mount_dirs",
        "namespace",
        "num_csx",
        "num_workers_per_csx",
        "python_paths",
        "retrace_every_iteration",
        "use_cs_grad_accum",
        "validate_only",
    ]
)
_IGNORED_KEYS = {
    "backend": _CLUSTER_KEYS,
    "logging": frozenset({"wsc_log_level", "enable_act_frequency"}),
    "precision": frozenset({"precision_opt_level", "precision_opt_levels"}),
    "checkpoint": frozenset({"checkpoint_name"}),
}
_OPTIMIZER_TO_PRECISION = ("loss_scaling_factor", "max_gradient_norm", "max_gradient_value", "log_loss_scale")
_RUNCONFIG = {
    "checkpoint_steps": ("checkpoint", "steps"),
    "save_initial_checkpoint": ("checkpoint", "save_initial_checkpoint"),
    "log_steps": ("logging", "log_steps"),
    "logging": ("logging", "log_level"),
} | {
    key: ("loop", key)
    for key in [
        "num_steps",
        "max_steps",
        "num_epochs",
        "steps_per_epoch",
        "eval_steps",
        "eval_frequency",
        "grad_accum_steps",
    ]
}


def drop_ignored(init: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """`trainer.init` without what only a Cerebras system understands.

    Args:
        init: the block as the user gave it; it stays as it is.
        path: where it stands.

    Returns:
        The rest of the block, and the paths of what was left out.

    Example:
        >>> drop_ignored({"backend": {"backend_type": "CSX", "compile_dir": "x"}}, "trainer.init")
        ({'backend': {'backend_type': 'CSX'}}, ['trainer.init.backend.compile_dir'])
    """
    rest, dropped = dict(init), list[str]()
    for block, keys in _IGNORED_KEYS.items():
        if isinstance(rest.get(block), dict):
            dropped += [f"{path}.{block}.{key}" for key in rest[block] if key in keys]
            rest[block] = {key: value for key, value in rest[block].items() if key not in keys}
    return rest, dropped


def is_legacy(content: Mapping[str, Any]) -> bool:
    """Whether a file without `trainer` has the blocks of the older form.

    Example:
        >>> is_legacy({"model": {}, "runconfig": {}}), is_legacy({"trianer": {}})
        (True, False)
    """
    return not content.keys().isdisjoint({"runconfig", "train_input", "eval_input", "model", "optimizer"})


def new_form(content: Mapping[str, Any]) -> str:
    """The older form of a file (`model`, `optimizer`, `train_input`, `runconfig`) rewritten with `trainer`.

    Args:
        content: the file as plain data.

    Returns:
        YAML text; keys without a place in the new form stand under `trainer.init` as they were.

    Example:
        >>> print(new_form({"model": {"name": "gpt2"}, "runconfig": {"max_steps": 5}}))
        trainer:
          init:
            model:
              name: gpt2
            loop:
              max_steps: 5
          fit: {}
    """
    blocks = dict(content)
    init: dict[str, Any] = {"model": blocks.pop("model", {"name": "gpt2"})}
    fit = {}
    for old, new in (("train_input", "train_dataloader"), ("eval_input", "val_dataloader")):
        if old in blocks:
            fit[new] = blocks.pop(old)
    _move_optimizer(blocks.pop("optimizer", None), init)
    _move_runconfig(blocks.pop("runconfig", None), init)
    text = yaml.safe_dump({"trainer": {"init": {**init, **blocks}, "fit": fit}}, sort_keys=False)
    return text.rstrip("\n")


def _move_optimizer(old: Any, init: dict[str, Any]) -> None:
    if not isinstance(old, dict):
        return
    options = dict(old)
    name = options.pop("optimizer_type", "AdamW")
    precision = {key: options.pop(key) for key in _OPTIMIZER_TO_PRECISION if key in options}
    rate = options.get("learning_rate")
    if isinstance(rate, dict | list):
        stages = rate if isinstance(rate, list) else [rate]
        init["schedulers"] = [_new_scheduler(stage) for stage in stages if isinstance(stage, dict)]
        options.pop("learning_rate")
    init["optimizer"] = {name: options}
    if precision:
        init["precision"] = precision


def _new_scheduler(old: dict[str, Any]) -> dict[str, Any]:
    options = dict(old)
    name = str(options.pop("scheduler", "Constant"))
    if "steps" in options:
        options["total_iters"] = options.pop("steps")
    return {f"{name.removesuffix('LR')}LR": options}


def _move_runconfig(old: Any, init: dict[str, Any]) -> None:
    for key, value in old.items() if isinstance(old, dict) else ():
        if key in _RUNCONFIG:
            block, name = _RUNCONFIG[key]
            init.setdefault(block, {})[name] = value
        elif key in ("seed", "model_dir"):
            init[key] = value
