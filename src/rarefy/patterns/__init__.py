"""What a mask must obey: balanced groups, each with a structure."""

from rarefy.patterns.constant_fan import FanIn, FanOut
from rarefy.patterns.diagonals import Diagonals
from rarefy.patterns.pattern import Pattern, parse_pattern
from rarefy.patterns.structures import FREE, Blocks, Free, NOfM, Structure
from rarefy.patterns.transposable import Transposable

__all__ = [
    "FREE",
    "Blocks",
    "Diagonals",
    "FanIn",
    "FanOut",
    "Free",
    "NOfM",
    "Pattern",
    "Structure",
    "Transposable",
    "parse_pattern",
]
