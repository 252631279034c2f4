"""Rebuilds tables of the results: `python -m quality [--quick] [--task TASK]... [--jobs N] TABLE...`."""

from __future__ import annotations

import argparse
import os
import warnings

from . import (
    equal_flops,
    equal_time,
    fine_tuning,
    methods,
    rivals,
    structure,
    structure_times,
    transfer,
    updates,
)
from .table import Scale, Table, write

_MODULES = (
    methods,
    structure,
    structure_times,
    equal_time,
    equal_flops,
    fine_tuning,
    transfer,
    rivals,
    updates,
)
TABLES: dict[str, Table] = {module.TABLE.name: module.TABLE for module in _MODULES}


def main() -> None:
    """Runs the tables that are named, or all of them."""
    parser = argparse.ArgumentParser(prog="python -m quality", description=__doc__)
    parser.add_argument("tables", nargs="*", metavar="TABLE", help="all by default")
    parser.add_argument("--quick", action="store_true", help="a few minutes; written to build/quality")
    parser.add_argument("--task", action="append", default=[], help="only this task of the tables")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the runs of a table")
    options = parser.parse_args()
    scale = Scale(options.quick, tuple(options.task), max(options.jobs, 1))
    # A layer that is timed inside a run would count as training, and another storage rounds otherwise.
    os.environ.setdefault("RAREFY_CALIBRATE", "0")
    warnings.filterwarnings("ignore", message="fewer than 4 connections")
    for name in options.tables or TABLES:
        print(write(TABLES[name], scale))


if __name__ == "__main__":
    main()
