"""From a configuration file as plain data to checked blocks, before anything is built; all unknown keys at once."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rarefy.data import registry as data_registry
from rarefy.errors import ConfigError, did_you_mean, join_path
from rarefy.models import registry as model_registry
from rarefy.run.file_keys import File, FitBlock, InitBlock, TrainerBlock, ValidateAllBlock, ValidateBlock
from rarefy.run.from_hf import with_folder
from rarefy.run.model_zoo import check_model, drop_ignored
from rarefy.validation import shorten
from rarefy.validation.findings import as_config_error, unknown_in
from rarefy.validation.numerals import validated
from rarefy.yaml_files.yaml_file import load_file

log = logging.getLogger("rarefy")

OVERLAY_BLOCKS = frozenset(
    key
    for block in (InitBlock, TrainerBlock)
    for name, field in block.model_fields.items()
    for key in [field.alias or name]
)
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


@dataclass(frozen=True)
class TrainerConfig:
    """One checked trainer of a file.

    Args:
        path: where it stands: `trainer`, or `trainer[1].trainer` in a list of trainers.
        blocks: its keys, checked, with defaults filled in.
        content: the same as the user gave it, for checkpoints.
    """

    path: str
    blocks: TrainerBlock
    content: dict[str, Any]

    @property
    def as_params(self) -> dict[str, Any]:
        """The trainer as a file of its own, plain data, as checkpoints keep it."""
        return {"trainer": self.content}

    def as_dense(self) -> TrainerConfig:
        """The same trainer without sparsity."""
        init = self.init.model_copy(update={"sparsity": None})
        return replace(self, blocks=self.blocks.model_copy(update={"init": init}))

    @property
    def checkpoint_root(self) -> Path:
        """The directory of its checkpoints."""
        checkpoint = self.init.checkpoint
        return (checkpoint and checkpoint.checkpoint_root) or Path(self.init.model_dir)

    @property
    def init(self) -> InitBlock:
        """`trainer.init`."""
        return self.blocks.init

    @property
    def fit(self) -> FitBlock | None:
        """`trainer.fit`."""
        return self.blocks.fit

    @property
    def validation(self) -> ValidateBlock | None:
        """`trainer.validate`."""
        return self.blocks.validation

    @property
    def validate_all(self) -> ValidateAllBlock | None:
        """`trainer.validate_all`."""
        return self.blocks.validate_all


def parse(content: Mapping[str, Any]) -> list[TrainerConfig]:
    """Checks a whole file.

    A file in the older form, without a `trainer` key, is converted; one line says so.

    Args:
        content: the file as plain data (`rarefy.yaml_files.yaml_file.load_file`).

    Returns:
        Its trainers in order; one for the plain form.

    Raises:
        ConfigError: unknown keys, a missing key, or a value that is not allowed.

    Example:
        >>> [one] = parse({"trainer": {"init": {"model": {"name": "gpt2"}, "loop": {"num_steps": 10}}}})
        >>> one.path, one.init.model.name
        ('trainer', 'gpt2')
    """
    content = _in_new_form(dict(content))
    _check_top(content)
    _refuse_nan(content, "")
    return [_parse_one(trainer, path) for path, trainer in trainers_of(content)]


def read_file(path: Path) -> dict[str, Any]:
    """A configuration file in the new form, whichever it was written in.

    Raises:
        YamlError: as for `load_file`.
        ConfigError: as for `new_form`.
    """
    return _in_new_form(load_file(path), str(path))


def _in_new_form(content: dict[str, Any], name: str = "the file") -> dict[str, Any]:
    # The older form lacks this key.
    if "trainer" in content:
        return content
    # Few files are of that form, and none of the others needs what translates it.
    from rarefy.run.old_form import in_new_form

    return in_new_form(content, name)


def trainers_of(content: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Every trainer of a file with its path, unchecked.

    Raises:
        ConfigError: a list of trainers whose elements are not `trainer:` mappings.
    """
    given = content.get("trainer")
    if not isinstance(given, list):
        return [("trainer", given)]
    if not given:
        raise ConfigError(
            "trainer", "an empty list", "one `trainer:` mapping or more", "- trainer: {init: {...}}"
        )
    for index, entry in enumerate(given):
        if not isinstance(entry, dict) or set(entry) != {"trainer"}:
            allowed = "a mapping with the single key `trainer`"
            raise ConfigError(f"trainer[{index}]", shorten(entry), allowed, "- trainer: {init: {...}}")
    return [(f"trainer[{index}].trainer", entry["trainer"]) for index, entry in enumerate(given)]


def json_schema() -> dict[str, Any]:
    """The JSON schema of a whole file, for editors.

    Example:
        >>> sorted(json_schema()["properties"])
        ['trainer']
    """
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **File.model_json_schema()}


def _check_top(content: Mapping[str, Any]) -> None:
    if "trainer" not in content:
        given = next((f"the key {key!r}" for key in content), "a file without keys")
        raise ConfigError("", given, "the key `trainer`", "trainer: {init: {...}, fit: {...}}")
    for key in content:
        if key != "trainer":
            raise ConfigError("", f"the key {key!r} beside `trainer`", "everything below `trainer`")


def _refuse_nan(value: Any, path: str) -> None:
    # NaN is neither below nor above any bound, so range checks would let it pass.
    if isinstance(value, float) and math.isnan(value):
        raise ConfigError(path, "nan", "a number")
    children = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, child in children:
        _refuse_nan(child, join_path(path, f"[{key}]" if isinstance(key, int) else str(key)))


def _parse_one(given: Any, path: str) -> TrainerConfig:
    if not isinstance(given, dict):
        raise ConfigError(path, shorten(given), "a mapping with `init`", "{init: {...}, fit: {...}}")
    check_model(given.get("init"), f"{path}.init")
    if _names_folder(given.get("init")):
        # Filled in before the checks, and kept: a checkpoint has the whole block then, whatever becomes of the
        # folder.
        given = {**given, "init": with_folder(given["init"], f"{path}.init")}
    cleaned = dict(given)
    dropped: list[str] = []
    if isinstance(given.get("init"), dict):
        cleaned["init"], dropped = drop_ignored(given["init"], f"{path}.init")
    blocks = _validated(cleaned, path)
    if dropped:
        log.warning("ignored, they mean something to a Cerebras system only: %s", ", ".join(dropped))
    return TrainerConfig(path, blocks, given)


def _names_folder(init: Any) -> bool:
    model = init.get("model") if isinstance(init, Mapping) else None
    return isinstance(model, Mapping) and model.get("from_hf") is not None


def _validated(given: dict[str, Any], path: str) -> TrainerBlock:
    """The checked blocks; unknown keys of the whole trainer come before every other finding."""
    blocks: TrainerBlock | None = None
    error: ValidationError | None = None
    try:
        blocks = validated(TrainerBlock.model_validate, given, path)
    except ValidationError as found:
        error = found
    unknown = [] if error is None else unknown_in(error, TrainerBlock, given)
    try:
        refuse([*(UnknownKey(where, key, known) for where, key, known in unknown), *of_open_blocks(given)])
    except ConfigError as several:
        raise several.under(path) from None
    if blocks is None:
        assert error is not None
        raise as_config_error(error, TrainerBlock, given).under(path) from None
    return blocks
