"""Which files of a Model Zoo checkout run, as the table of docs/from-model-zoo.md.

    python benchmarks/zoo_files.py modelzoo/src/cerebras/modelzoo/models

Every file is checked as far as that goes without its data and without the memory for its model: keys, values, the
model's configuration, the options of its data, schedules and callbacks.
"""

from __future__ import annotations

import logging
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from rarefy.data.registry import DATA_PROCESSORS
from rarefy.decoder.config_check import check_config
from rarefy.errors import RarefyError
from rarefy.models.registry import MODELS, read_zoo_keys
from rarefy.run.builder import Builder
from rarefy.run.schema import TrainerConfig, parse, read_file
from rarefy.validation import build


def check(config: TrainerConfig) -> None:
    """Checks one trainer of a file.

    Raises:
        RarefyError: it would not run.
    """
    kind = MODELS[config.init.model.name.lower()][0]
    check_config(build(kind, read_zoo_keys(config.init.model.options)))
    builder = Builder(config, Path())
    _ = builder.schedulers, builder.callbacks
    blocks = [config.fit.train_dataloader, *config.fit.val_dataloader] if config.fit else []
    for block in blocks:
        options = {key: value for key, value in block.options.items() if key != "data_processor"}
        build(DATA_PROCESSORS[block.data_processor].config_class, options)


def kind_and_fault(path: Path) -> tuple[str, str]:
    """The name of a file's model, and why it does not run; empty where it does."""
    content: Any = read_file(path)
    trainers = content.get("trainer")
    first = trainers[0]["trainer"] if isinstance(trainers, list) else trainers
    name = str(first["init"]["model"]["name"]).split("/")[0]
    try:
        for config in parse(content):
            check(config)
    except RarefyError as error:
        return name, str(error).split(" is not allowed")[0].split(", ", 1)[-1].removesuffix(
            " of the Model Zoo,"
        )
    return name, ""


def main(folder: Path) -> None:
    """Prints the table."""
    logging.disable(logging.CRITICAL)
    counts: dict[tuple[str, str], int] = defaultdict(int)
    for path in sorted(folder.rglob("configs/**/*.yaml")):
        counts[kind_and_fault(path)] += 1
    print("| model | files | |\n|---|---:|---|")
    for (name, fault), number in sorted(counts.items(), key=lambda item: (bool(item[0][1]), item[0])):
        print(f"| `{name}` | {number} | {f'refused: {fault}' if fault else 'runs'} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
