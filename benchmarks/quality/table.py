"""What every table is: cells to measure, and a JSON file with what came out."""

from __future__ import annotations

import datetime
import json
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import records
from .records import Row, read, summarised
from .tasks import TASKS, Task

BUILD = Path("build") / "quality"


@dataclass(frozen=True)
class Scale:
    """How much of a table is run.

    Args:
        quick: whether it is the form of a few minutes, which is written to `build/quality` and never to the docs.
        only: names of the tasks to run; empty for all of the table.
        jobs: how many processes share the runs of a table whose runs are not timed against each other.
    """

    quick: bool = False
    only: tuple[str, ...] = ()
    jobs: int = 1

    @property
    def folder(self) -> Path:
        """Where the table's files are."""
        return BUILD if self.quick else records.HERE

    @property
    def seeds(self) -> range:
        """Of the runs that count."""
        return range(2) if self.quick else range(5)

    @property
    def tuning_seeds(self) -> range:
        """Of the runs that choose a learning rate; none of them is a seed of a run that counts."""
        return range(100, 101) if self.quick else range(100, 102)

    def repeats(self, usual: int) -> int:
        """How often that is measured of which the median counts."""
        return 1 if self.quick else usual

    def steps(self, task: Task) -> int:
        """The budget of every run on a task."""
        return max(task.steps // 40, 10) if self.quick else task.steps

    def tasks(self, names: Sequence[str]) -> list[Task]:
        """Those of a table that are asked for."""
        return [TASKS[name] for name in names if not self.only or name in self.only]


@dataclass(frozen=True)
class Table:
    """One table of the results.

    Args:
        name: of its files.
        run: measures what the CSV file does not have yet.
        values: the columns of the CSV file that are averaged over the seeds.
    """

    name: str
    run: Callable[[Scale], object]
    values: tuple[str, ...]

    def rows(self, folder: Path) -> list[Row]:
        """What the JSON file holds: the CSV file, averaged."""
        return summarised(read(folder / f"{self.name}.csv"), self.values)


def write(table: Table, scale: Scale) -> Path:
    """Runs a table and writes its JSON file."""
    torch.set_num_threads(1)
    table.run(scale)
    path = scale.folder / f"{table.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(row) for row in table.rows(scale.folder))
    head = json.dumps({"table": table.name, **machine(path)}, indent=2)[:-2]
    path.write_text(f'{head},\n  "rows": [\n{lines}\n  ]\n}}\n')
    return path


def load(name: str, folder: Path = records.HERE) -> dict[str, Any]:
    """A table's JSON file."""
    return json.loads((folder / f"{name}.json").read_text())


def machine(path: Path) -> dict[str, str]:
    """What the figures depend on; days and processors that measured a part of an earlier file are named too."""
    known = json.loads(path.read_text()) if path.exists() else {}
    now = {"measured": datetime.date.today().isoformat(), "processor": processor()}
    shared = {key: joined(known.get(key, ""), value) for key, value in now.items()}
    return {**shared, "torch": torch.__version__, "python": platform.python_version()}


def joined(known: str, new: str) -> str:
    """Names in a row, each once."""
    return " and ".join(dict.fromkeys([*filter(None, known.split(" and ")), new]))


def processor() -> str:
    """Name and generation, as the system tells."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.exists() else ""
    found = {
        key: value
        for key, value in re.findall(r"^(model name|cpu family|flags)\s*: (.*)$", text, re.MULTILINE)
    }
    if not found:
        return platform.processor() or "unknown"
    flags = found.get("flags", "").split()
    if "amx_bf16" in flags:
        generation = "with AMX"
    elif "Intel" in found.get("model name", ""):
        generation = "with AVX-512" if "avx512f" in flags else ""
    else:
        # Zen 3 and 4 are one family; Zen 4 has AVX-512.
        third = "Zen 4" if "avx512f" in flags else "Zen 3"
        generation = {"23": "Zen 2", "25": third, "26": "Zen 5"}.get(found.get("cpu family", ""), "")
    return " ".join(part for part in (found.get("model name", "unknown"), generation) if part)
