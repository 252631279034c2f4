"""Prints in which files of rarefy a function runs between `rarefy run FILE` and the end of the first optimizer step.

First those that run before the first forward pass of training begins, then an empty line, then those that come later.
Being imported does not count: module and class bodies are no functions, and neither does what these call.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch._dynamo  # which the first optimizer imports anyway, and slowly under a profile function
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

import rarefy
from rarefy.cli import main

SOURCE = f"{Path(rarefy.__file__).parent}{os.sep}"
IS_FUNCTION = 1  # CO_OPTIMIZED of inspect: module and class bodies lack it

entered: set[str] = set()
before: set[str] = set()


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


def note_beginning(module: nn.Module, _: Any) -> None:
    """Called before each forward pass; the first one that trains ends what comes before."""
    # A rehearsal has weights without memory.
    trains = (
        module.training and torch.is_grad_enabled() and not any(one.is_meta for one in module.parameters())
    )
    if trains and not before:
        before.update(entered)


def stop(*_: Any) -> None:
    """Called after the first optimizer step."""
    sys.setprofile(None)
    for files in (before, entered - before):
        print("\n".join(sorted(name.removeprefix(SOURCE) for name in files)), end="\n\n")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    register_module_forward_pre_hook(note_beginning)
    register_optimizer_step_post_hook(stop)
    sys.setprofile(note)
    main()
