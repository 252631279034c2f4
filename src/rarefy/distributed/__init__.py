"""Training in several processes; without a process group nothing is exchanged."""

from rarefy.distributed.agreement import agreed_seed, differing, highest_of_all, mean_over_ranks
from rarefy.distributed.membership import is_first, join_processes, place, ranks, wait_for_all
from rarefy.distributed.parallel import Parallel, ParallelConfig
from rarefy.distributed.shards import WHOLE_WEIGHTS, cut_by

__all__ = [
    "WHOLE_WEIGHTS",
    "Parallel",
    "ParallelConfig",
    "agreed_seed",
    "cut_by",
    "differing",
    "highest_of_all",
    "is_first",
    "join_processes",
    "mean_over_ranks",
    "place",
    "ranks",
    "wait_for_all",
]
