"""`--set key.path=value`: changes single values of a configuration before it is checked."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Sequence
from typing import Any

from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.yaml_files.yaml_file import parse_value

EXAMPLE = "--set trainer.init.optimizer.AdamW.lr=1e-3"


def overlay(
    config: dict[str, Any], assignments: Sequence[str], blocks: Collection[str] = ()
) -> dict[str, Any]:
    """A copy of `config` with some values replaced or added.

    A key that holds dots or brackets itself (a glob, an import path) is matched as a whole where it exists.

    Args:
        config: a configuration as plain data; it stays as it is.
        assignments: `key.path=value` each; list elements as `[1]` or `.1`, the value is YAML.
        blocks: names of mappings that are created where they are missing.

    Returns:
        The changed copy.

    Raises:
        ConfigError: no `=`, a part of the path that does not exist, an index outside of its list.
        YamlError: the value is not YAML.

    Example:
        >>> overlay({"init": {"sparsity": [{"sparsity": 0.5}]}}, ["init.sparsity[0].sparsity=0.9"])
        {'init': {'sparsity': [{'sparsity': 0.9}]}}
    """
    changed = copy.deepcopy(config)
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        if not equals or not path.strip():
            raise ConfigError("--set", assignment or "nothing", "key.path=value", EXAMPLE)
        assign(changed, path.strip(), parse_value(value), blocks)
    return changed


def assign(config: dict[str, Any], path: str, value: Any, blocks: Collection[str] = ()) -> None:
    """Sets the value at `path` in place; see `overlay`.

    Raises:
        ConfigError: a part of the path that does not exist.

    Example:
        >>> config = {"trainer": {"init": {}}}
        >>> assign(config, "trainer.init.loop.num_steps", 5, blocks=["loop"]); config
        {'trainer': {'init': {'loop': {'num_steps': 5}}}}
    """
    here = config
    done = ""
    rest = path
    while True:
        key, rest = _first_key(here, rest, done)
        if not rest:
            here[key] = value
            return
        if isinstance(here, dict) and here.get(key) is None:
            _create(here, key, done, blocks)
        done = join_path(done, f"[{key}]" if isinstance(here, list) else key)
        here = here[key]


def _first_key(here: Any, rest: str, done: str) -> tuple[Any, str]:
    if isinstance(here, list):
        return _first_index(here, rest, done)
    if not isinstance(here, dict):
        raise ConfigError(
            f"--set {done}".strip(), f"`{rest}` below {here!r}", "a path that ends here", f"--set {done}=..."
        )
    whole = [key for key in here if rest == key or rest.startswith((f"{key}.", f"{key}["))]
    # The longest, as `a.b` may be a key beside `a`.
    key = max(whole, key=len) if whole else re.split(r"[.\[]", rest, maxsplit=1)[0]
    if not key:
        raise ConfigError(f"--set {done}".strip(), f"`{rest}`", "keys with one dot between them", EXAMPLE)
    return key, rest[len(key) :].removeprefix(".")


def _first_index(here: list[Any], rest: str, done: str) -> tuple[int, str]:
    found = re.match(r"\[(\d+)\]|(\d+)(?=[.\[]|$)", rest)
    if found is None or int(found[1] or found[2]) >= len(here):
        allowed = f"an index from 0 to {len(here) - 1}" if here else "no index, the list is empty"
        raise ConfigError(f"--set {done}".strip(), f"`{rest}`", allowed, f"--set {done}[0]=...")
    return int(found[1] or found[2]), rest[found.end() :].removeprefix(".")


def _create(here: dict[str, Any], key: str, done: str, blocks: Collection[str]) -> None:
    if key not in blocks:
        # A key that is there but null is spelt rightly; the blocks would be no help.
        known = [str(name) for name in here] + ([] if key in here else list(blocks))
        raise ConfigError(
            f"--set {done}".strip(), f"`{key}`", f"a key of the file ({did_you_mean(key, known)})", EXAMPLE
        )
    here[key] = {}
