"""rarefy trains any PyTorch model with weight sparsity."""

from rarefy import callbacks, masks, patterns, schedules
from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.algorithms.gmp import GMP
from rarefy.algorithms.group import Group
from rarefy.algorithms.keep_pruned import finalize
from rarefy.algorithms.rigl import RigL
from rarefy.algorithms.set import SET
from rarefy.algorithms.static import Static
from rarefy.config import configure
from rarefy.report import summary
from rarefy.training.trainer import Trainer

__all__ = [
    "GMP",
    "SET",
    "DynamicSparsityAlgorithm",
    "Group",
    "RigL",
    "SparsityAlgorithm",
    "Static",
    "Trainer",
    "callbacks",
    "configure",
    "finalize",
    "masks",
    "patterns",
    "schedules",
    "summary",
]
