"""`rarefy data hdf5`: text files become the HDF5 files that `GptHDF5MapDataProcessor` reads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from rarefy.cli import messages
from rarefy.data.hdf5_writer import write_hdf5


def write(
    files: Sequence[Path],
    out_dir: Path,
    max_sequence_length: int,
    tokenizer: Path | None,
    form: Literal["samples", "corpus"],
    samples_per_file: int,
) -> None:
    """Writes the files under a progress bar and says where they are; see `write_hdf5`."""
    columns = (BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("")
        written = write_hdf5(
            files,
            out_dir,
            max_sequence_length=max_sequence_length,
            tokenizer=tokenizer,
            format=form,
            samples_per_file=samples_per_file,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    messages.say(f"{len(written)} files in {out_dir}")
