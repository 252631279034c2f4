"""From pydantic's findings to one line that names the path and the fix."""

from rarefy.validation.block import read_block
from rarefy.validation.fields import (
    Level,
    LevelMark,
    Number,
    Step,
    StepCount,
    StepMark,
    build,
    marked_fields,
    marks_in,
    shorten,
    worded,
)
from rarefy.validation.locations import dotted

__all__ = [
    "Level",
    "LevelMark",
    "Number",
    "Step",
    "StepCount",
    "StepMark",
    "build",
    "dotted",
    "marked_fields",
    "marks_in",
    "read_block",
    "shorten",
    "worded",
]
