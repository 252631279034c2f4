"""What a mask must obey: balanced groups, each with a structure."""

from rarefy.patterns.pattern import Pattern, parse_pattern
from rarefy.patterns.structures import FREE, Blocks, FanIn, Free, NOfM, Structure
from rarefy.patterns.two_sided import FanOut, Transposable

__all__ = [
    "FREE",
    "Blocks",
    "FanIn",
    "FanOut",
    "Free",
    "NOfM",
    "Pattern",
    "Structure",
    "Transposable",
    "parse_pattern",
]
