"""What files written for Cerebras' Model Zoo hold and rarefy has no use for, and the models that it does not have."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from rarefy.callbacks.ignored import IGNORED
from rarefy.errors import ConfigError
from rarefy.models.registry import MODELS

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
    "precision": frozenset(
        {"precision_opt_level", "precision_opt_levels", "min_loss_scale", "max_loss_scale"}
    ),
    "checkpoint": frozenset({"checkpoint_name", "strict_version"}),
}
# Values at which the Model Zoo does nothing either; no word is needed for them.
_SILENT: Mapping[tuple[str, str], tuple[Any, ...]] = MappingProxyType(
    {
        ("checkpoint", "strict_version"): (True, False),
        ("checkpoint", "checkpoint_name"): ("checkpoint_{step}.mdl",),
        ("logging", "enable_act_frequency"): (False,),
        ("backend", "log_initialization"): (True, False),
        ("backend", "lazy_initialization"): (True, False),
        ("backend", "use_cs_grad_accum"): (True, False),
    }
)
_BITS_OF_ALL = "csx."
_OTHER_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "an encoder": ("bert", "esm2", "dpr", "bertforpretraining", "robertapretraining"),
        "an encoder with a decoder": ("t5", "transformer", "t5forconditionalgeneration"),
        "a vision model": (
            "vision_transformer",
            "vit",
            "dino",
            "dit",
            "fc_mnist",
            "unet",
            "vae",
            "diffusion",
        ),
        "a multimodal model": ("llava", "multimodal_simple", "mllama", "clip"),
        "preference training": ("dpo",),
    }
)


def check_model(init: Any, path: str) -> None:
    """Refuses the Model Zoo's models that rarefy does not have, before anything else of a file is looked at.

    Args:
        init: `trainer.init` as the user gave it.
        path: where it stands.

    Raises:
        ConfigError: such a model.
    """
    model = init.get("model") if isinstance(init, dict) else None
    name = model.get("name") if isinstance(model, dict) else None
    if not isinstance(name, str):
        return
    first = name.lower().split("/")[0]
    for kind, names in _OTHER_KINDS.items():
        if first in names and name.lower() not in MODELS:
            allowed = (
                f"a decoder language model ({', '.join(sorted(MODELS))}) or your own as package.module:Class"
            )
            raise ConfigError(f"{path}.model.name", f"{name!r}, {kind} of the Model Zoo,", allowed)


def drop_ignored(init: Mapping[str, Any], path: str) -> tuple[dict[str, Any], list[str]]:
    """`trainer.init` without what only a Cerebras system understands.

    Args:
        init: the block as the user gave it; it stays as it is.
        path: where it stands.

    Returns:
        The rest of the block, and the paths of what was left out and would mean something there.

    Example:
        >>> drop_ignored({"backend": {"backend_type": "CSX", "compile_dir": "x"}}, "trainer.init")
        ({'backend': {'backend_type': 'CSX'}}, ['trainer.init.backend.compile_dir'])
    """
    rest = dict(init)
    dropped: list[str] = []
    # Taken out either way, told only where it would have done something.
    if "autorestart" in rest and rest.pop("autorestart"):
        dropped.append(f"{path}.autorestart")
    for block in _IGNORED_KEYS:
        if not isinstance(rest.get(block), dict):
            continue
        given = rest[block]
        gone = [key for key in given if _is_theirs(block, key)]
        dropped += [f"{path}.{block}.{key}" for key in gone if not _is_silent(block, key, given[key])]
        rest[block] = {key: value for key, value in given.items() if key not in gone}
    if isinstance(rest.get("precision"), dict):
        rest["precision"] = {key: value for key, value in rest["precision"].items() if value is not None}
    return rest, dropped


def is_for_cerebras(init: Any) -> bool:
    """Whether a file was written for a Cerebras system, and shall run here without being edited.

    Args:
        init: `trainer.init` as the user gave it.

    Returns:
        True where it holds something that only such a system understands, whatever its value: a key, or a callback.

    Example:
        >>> is_for_cerebras({"backend": {"backend_type": "CSX"}}), is_for_cerebras({"device": "cpu"})
        (True, False)
    """
    if not isinstance(init, Mapping):
        return False
    blocks = {block: init[block] for block in _IGNORED_KEYS if isinstance(init.get(block), Mapping)}
    keys = any(_is_theirs(block, key) for block, given in blocks.items() for key in given)
    # In any case, as these are read.
    devices = {
        str(one).upper() for one in (init.get("device"), blocks.get("backend", {}).get("backend_type"))
    }
    lists = [init[kind] for kind in ("callbacks", "loggers") if isinstance(init.get(kind), list)]
    watchers = any(
        name in IGNORED
        for entries in lists
        for entry in entries
        if isinstance(entry, Mapping)
        for name in entry
    )
    return keys or watchers or "CSX" in devices or "autorestart" in init


def _is_theirs(block: str, key: Any) -> bool:
    return key in _IGNORED_KEYS[block] or str(key).startswith(_BITS_OF_ALL)


def _is_silent(block: str, key: str, value: Any) -> bool:
    return value is None or value in _SILENT.get((block, key), ())
