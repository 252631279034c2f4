"""What a mask must obey: balanced groups, each with a structure."""

from rarefy.patterns.pattern import Pattern, parse_pattern
from rarefy.patterns.structures import FREE, Blocks, FanIn, Free, NOfM, Structure

__all__ = ["FREE", "Blocks", "FanIn", "Free", "NOfM", "Pattern", "Structure", "parse_pattern"]
