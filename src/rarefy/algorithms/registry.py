"""Algorithm names, as written in YAML."""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.gmp import GMP
from rarefy.algorithms.rigl import RigL
from rarefy.algorithms.set import SET
from rarefy.algorithms.static import Static

ALGORITHMS: Mapping[str, type[SparsityAlgorithm]] = {
    "static": Static,
    "gmp": GMP,
    "set": SET,
    "rigl": RigL,
}
