"""Writes docs/keys.md: every key of a configuration file, from the classes that check it.

python docs/scripts/key_reference.py
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel, TypeAdapter
from pydantic.fields import FieldInfo

from rarefy.callbacks.registry import DEFAULTS, REGISTRY
from rarefy.checkpoint.directory import CheckpointConfig
from rarefy.data.registry import DATA_PROCESSORS
from rarefy.distributed import ParallelConfig
from rarefy.optim.optimizers import optimizer_classes
from rarefy.optim.schedulers import SCHEDULES, TORCH_SCHEDULERS
from rarefy.run import file_keys
from rarefy.trainer.plan import LoggingConfig, LoopConfig
from rarefy.trainer.precision import PrecisionConfig

PAGE = Path(__file__).parents[1] / "keys.md"
HEAD = """\
# Every key of the file

Made by `docs/scripts/key_reference.py` from the classes that check a file, so it says what the installed version takes. The `sparsity:` block has
[a page of its own](sparsity.md), and so have [custom algorithms](custom.md). `rarefy schema` prints the same for editors.
"""
BLOCKS: tuple[tuple[str, type, str], ...] = (
    ("trainer", file_keys.TrainerBlock, "`trainer` may also be a list of `trainer:` mappings, which run one after the other."),
    ("trainer.init", file_keys.InitBlock, ""),
    ("trainer.init.model", file_keys.ModelBlock, "Other keys are the model's own. With `from_hf` they go before what the folder says, and no `name` is needed."),
    ("trainer.init.backend", file_keys.BackendBlock, "Other keys, which mean something to a Cerebras system only, are ignored with a note."),
    ("trainer.init.loop", LoopConfig, ""),
    ("trainer.init.logging", LoggingConfig, ""),
    ("trainer.init.precision", PrecisionConfig, ""),
    ("trainer.init.parallel", ParallelConfig, "For `rarefy run FILE --nproc N` and `torchrun`; a single process ignores it."),
    ("trainer.init.checkpoint", CheckpointConfig, ""),
    ("trainer.fit", file_keys.FitBlock, ""),
    ("trainer.validate", file_keys.ValidateBlock, ""),
    ("trainer.validate_all", file_keys.ValidateAllBlock, ""),
)  # fmt: skip
OPTIMIZER_OPTIONS = {
    "lr": "learning rate; `learning_rate` means the same",
    "betas": "decay of the averages of gradients and of their squares",
    "eps": "added to a denominator",
    "weight_decay": "share of each weight that is taken away; biases, norms and embeddings get none",
    "momentum": "share of the last step that is kept",
    "dampening": "share of the gradient that momentum leaves out",
    "nesterov": "momentum that looks ahead",
    "amsgrad": "never lets the average of squares fall",
    "maximize": "climbs instead of descends",
}


def key_reference() -> str:
    """The whole page."""
    parts = [HEAD, *(_block(*block) for block in BLOCKS), _data(), _optimizers(), _schedulers(), _callbacks()]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _block(path: str, kind: type, note: str) -> str:
    return "\n\n".join(filter(None, [f"## `{path}`", note, table(kind)])) + "\n"


def table(kind: type) -> str:
    """The keys of one class: what each takes, its default, what it means, and an example."""
    rows = ["| key | takes | default | meaning | example |", "|---|---|---|---|---|"]
    meanings = documented(kind)
    for name, field in kind.__pydantic_fields__.items():  # type: ignore[attr-defined]
        key, (takes, example) = field.alias or name, hints(field)
        meaning = meanings.get(name) or ("no effect." if "not used" in takes else "")
        takes = takes or ("true or false" if field.annotation is bool else "")
        rows.append(_row([f"`{key}`", takes, _default(field), meaning, f"`{key}: {example}`"]))
    return "\n".join(rows)


def documented(kind: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of its keys."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        arguments = re.search(r"\nArgs:\n(.*?)(?:\n\n|\Z)", inspect.cleandoc(base.__doc__ or ""), re.DOTALL)
        for name, text in re.findall(
            r"^ {4}(\w+): (.*(?:\n {8}.*)*)", arguments[1] if arguments else "", re.MULTILINE
        ):
            found[name] = " ".join(text.split())
    return found


def hints(field: FieldInfo) -> tuple[str, str]:
    """What a field takes, in words, and an example; both may stand inside its type."""
    notes = [field, *_inner_notes(field.annotation)]
    takes = next((note.description for note in notes if note.description), "")
    example = next((note.examples[0] for note in notes if note.examples), None)
    if example is None:
        example = next(iter(TypeAdapter(field.annotation).json_schema().get("enum", [])), None)
    if example is None and isinstance(field.default, bool | int | float | str):
        example = field.default
    return takes, "null" if example is None else _yaml(example)


def _inner_notes(annotation: Any) -> Iterator[FieldInfo]:
    for part in get_args(annotation):
        yield from (note for note in getattr(part, "__metadata__", ()) if isinstance(note, FieldInfo))
        yield from _inner_notes(part)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if isinstance(value, BaseModel):
        return "that of its keys"
    return "–" if value is None or value == [] else f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, list | tuple) else str(value)


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _summary(kind: type) -> str:
    return inspect.cleandoc(kind.__doc__ or "").partition("\n\n")[0].replace("\n", " ")


def _data() -> str:
    parts = ["## `train_dataloader`, `val_dataloader`"]
    parts.append(
        "`data_processor` names what reads the data, or is an import path of a function, which gets all other keys."
    )
    for name, processor in DATA_PROCESSORS.items():
        parts += [f"### `{name}`", _summary(processor), table(processor.config_class)]
    return "\n\n".join(parts) + "\n"


def _optimizers() -> str:
    rows = ["| optimizer | options and defaults |", "|---|---|"]
    for name, kind in sorted(optimizer_classes().items()):
        options = [f"`{key}: {_yaml(value)}`" for key, value in _options(kind).items()]
        rows.append(_row([f"`{name}`", ", ".join(options)]))
    meanings = [f"- `{key}`: {meaning}." for key, meaning in OPTIMIZER_OPTIONS.items()]
    text = (
        "One of `torch.optim`, in any case, or an import path. Options are those of its class in torch "
        + torch.__version__.partition("+")[0].rpartition(".")[0]
    )
    return (
        "\n\n".join(["## `optimizer`", f"{text}; the common ones:", "\n".join(meanings), "\n".join(rows)])
        + "\n"
    )


def _options(kind: type) -> Mapping[str, Any]:
    """The options with a default; a tensor among them would be torch's own affair."""
    parameters = inspect.signature(kind).parameters
    technical = {"params", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay"}
    return {
        name: one.default
        for name, one in parameters.items()
        if name not in technical and isinstance(one.default, int | float | tuple | str | None)
    }


def _schedulers() -> str:
    parts = [
        "## `schedulers`",
        "A list of maps from one scheduler to its options; the learning rate of step k is that of k − 1.",
    ]
    for name, kind in sorted(SCHEDULES.items()):
        parts += [f"### `{name}`", _summary(kind), table(kind)]
    others = " and ".join(f"`{name}`" for name in TORCH_SCHEDULERS)
    parts.append(
        f"Of torch itself: {others}, with the options of their classes; any other by its import path."
    )
    return "\n\n".join(parts) + "\n"


def _callbacks() -> str:
    parts = []
    for kind, registered in REGISTRY.items():
        rows = [f"| {kind[:-1]} | options | there by default | what it does |", "|---|---|---|---|"]
        for name, one in registered.items():
            options = ", ".join(
                f"`{option}`: {documented(one.kind).get(option, '')}" for option in one.options
            )
            is_default = "yes" if name in DEFAULTS[kind] else "no"
            rows.append(_row([f"`{name}`", options or "–", is_default, _summary(one.kind)]))
        text = (
            "A list of maps from one name, or import path, to its options; `Name: null` takes a default away."
        )
        parts.append("\n\n".join([f"## `{kind}`", text, "\n".join(rows)]))
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(key_reference(), encoding="utf-8")
