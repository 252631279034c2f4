"""Prints in which files of rarefy a function runs between `rarefy run FILE` and the end of the first optimizer step.

Being imported does not count: module and class bodies are no functions, and neither does what these call.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

from torch.optim.optimizer import register_optimizer_step_post_hook

import rarefy
from rarefy.cli import main

SOURCE = f"{Path(rarefy.__file__).parent}{os.sep}"
IS_FUNCTION = 1  # CO_OPTIMIZED of inspect: module and class bodies lack it

entered: set[str] = set()


def is_importing(frame: FrameType | None) -> bool:
    """Whether a module body of rarefy is among the callers."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "<module>" and code.co_filename.startswith(SOURCE):
            return True
        frame = frame.f_back
    return False


def note(frame: FrameType, event: str, _: Any) -> None:
    """The profile function."""
    code = frame.f_code
    if event != "call" or not code.co_filename.startswith(SOURCE) or code.co_filename in entered:
        return
    if code.co_flags & IS_FUNCTION and not is_importing(frame):
        entered.add(code.co_filename)


def stop(*_: Any) -> None:
    """Called after the first optimizer step."""
    sys.setprofile(None)
    print("\n".join(sorted(name.removeprefix(SOURCE) for name in entered)))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    register_optimizer_step_post_hook(stop)
    sys.setprofile(note)
    main()
