"""Settings of the whole suite."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

settings.register_profile("rarefy", max_examples=30, deadline=None)
settings.load_profile("rarefy")

# Tiny tensors: a second thread only costs time, and the suite runs two workers side by side.
torch.set_num_threads(1)

# What somebody calibrated on this machine must not decide what is tested.
os.environ["RAREFY_CACHE"] = str(Path(__file__).parent / "no_cache")

# Nor must the terminal in which somebody runs the tests, or what a build server asks of one.
os.environ["TERM"] = "xterm"
for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# Which storage `auto` takes is not to depend on how busy this machine is.
os.environ["RAREFY_CALIBRATE"] = "0"


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Modules and tests by the ten thousand stay to the end: no collection of garbage looks through them again."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()
