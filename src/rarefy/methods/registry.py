"""Algorithm names, as written in YAML."""

from __future__ import annotations

from collections.abc import Mapping

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.methods.ac_dc import ACDC
from rarefy.methods.gmp import GMP
from rarefy.methods.granet import GraNet
from rarefy.methods.mest import MEST
from rarefy.methods.movement import Movement
from rarefy.methods.powerprop import Powerprop
from rarefy.methods.rigl import RigL
from rarefy.methods.set import SET
from rarefy.methods.srigl import SRigL
from rarefy.methods.static import Static
from rarefy.methods.top_kast import TopKAST

ALGORITHMS: Mapping[str, type[SparsityAlgorithm]] = {
    "static": Static,
    "gmp": GMP,
    "set": SET,
    "rigl": RigL,
    "mest": MEST,
    "movement": Movement,
    "powerprop": Powerprop,
    "top_kast": TopKAST,
    "ac_dc": ACDC,
    "granet": GraNet,
    "srigl": SRigL,
}
