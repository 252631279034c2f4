"""From pydantic's findings to one line that names the path and the fix."""

from rarefy.validation.block import read_block
from rarefy.validation.fields import Number, Step, StepCount, build, shorten
from rarefy.validation.locations import dotted

__all__ = ["Number", "Step", "StepCount", "build", "dotted", "read_block", "shorten"]
