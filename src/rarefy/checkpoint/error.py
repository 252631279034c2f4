"""What goes wrong with checkpoints, in one line."""

from __future__ import annotations

from pathlib import Path

from rarefy.errors import RarefyError


class CheckpointError(RarefyError):
    """A checkpoint that cannot be written or read.

    Args:
        path: the file or directory concerned.
        problem: what is wrong with it.
        remedy: what the user can do.

    Example:
        >>> print(CheckpointError("run/checkpoint_5", "is damaged", "use another one"))
        run/checkpoint_5: is damaged; use another one
    """

    def __init__(self, path: Path | str, problem: str, remedy: str) -> None:
        self.path = Path(path)
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{path}: {problem}; {remedy}")


class NewerFormatError(CheckpointError):
    """A checkpoint that is whole, but of a format that only a newer rarefy reads."""
