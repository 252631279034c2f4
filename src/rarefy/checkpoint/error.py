"""What goes wrong with checkpoints, in one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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

    def __reduce__(self) -> tuple[Any, ...]:
        # torch sends what one process raised to the others.
        return type(self), (self.path, self.problem, self.remedy)


def unwritten(path: Path, problem: OSError | str) -> CheckpointError:
    """The error about a checkpoint that could not be written.

    Example:
        >>> print(unwritten(Path("checkpoint_5"), "no space").problem)
        cannot be written: no space
    """
    reason = problem if isinstance(problem, str) else problem.strerror or str(problem)
    remedy = "free space or fix the permissions; the checkpoints before it are intact"
    return CheckpointError(path, f"cannot be written: {reason}", remedy)


class NewerFormatError(CheckpointError):
    """A checkpoint that is whole, but of a format that only a newer rarefy reads."""
