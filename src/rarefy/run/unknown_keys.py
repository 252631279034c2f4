"""All unknown keys of a trainer at once, so that a file is mended in one go."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from rarefy.data import registry as data_registry
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.models import registry as model_registry

_DATA_BLOCKS = (
    ("fit", "train_dataloader"),
    ("fit", "val_dataloader"),
    ("validate", "val_dataloader"),
    ("validate_all", "val_dataloaders"),
)


@dataclass(frozen=True)
class UnknownKey:
    """A key that its block does not have.

    Args:
        path: of the block.
        key: as given.
        known: what the block has.
    """

    path: str
    key: str
    known: frozenset[str]

    @property
    def hint(self) -> str:
        """The known key that was meant, or the known keys."""
        return did_you_mean(self.key, self.known)

    def __str__(self) -> str:
        where = join_path(self.path, self.key)
        return f"{where} ({self.hint})" if self.hint.startswith("did you mean") else where


def of_open_blocks(given: Mapping[str, Any]) -> Iterator[UnknownKey]:
    """The unknown keys of the model and of the data, whose kinds have keys of their own.

    Args:
        given: a trainer as the user gave it.

    Returns:
        Each with its path below the trainer; an identical block (an alias) is told once.
    """
    model = given.get("init", {}).get("model") if isinstance(given.get("init"), dict) else None
    if isinstance(model, dict) and isinstance(model.get("name"), str):
        known = model_registry.known_keys(model["name"])
        yield from _unknown(model, "init.model", known, {"name", "from_hf"})
    seen: list[Any] = []
    for path, block in _data_blocks(given):
        if block in seen or not isinstance(block.get("data_processor"), str):
            continue
        seen.append(block)
        known = data_registry.known_keys(block["data_processor"])
        yield from _unknown(block, path, known, {"data_processor"})


def _data_blocks(given: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for outer, inner in _DATA_BLOCKS:
        blocks = given[outer].get(inner) if isinstance(given.get(outer), dict) else None
        for index, block in enumerate(blocks if isinstance(blocks, list) else [blocks]):
            place = f"{outer}.{inner}[{index}]" if isinstance(blocks, list) else f"{outer}.{inner}"
            if isinstance(block, dict):
                yield place, block


def _unknown(
    block: Mapping[str, Any], path: str, known: frozenset[str] | None, more: set[str]
) -> Iterator[UnknownKey]:
    if known is None:
        return
    for key in block:
        if key not in known and key not in more:
            yield UnknownKey(path, str(key), known)


def refuse(unknown: Iterable[UnknownKey]) -> None:
    """Raises one error for all of them.

    Raises:
        ConfigError: there is at least one.
    """
    found = list(unknown)
    if len(found) == 1:
        [one] = found
        raise ConfigError(one.path, f"the key {one.key!r}", f"a known key ({one.hint})")
    if found:
        listed = ", ".join(map(str, found))
        raise ConfigError("", f"{len(found)} unknown keys ({listed})", "known keys; see `rarefy schema`")
