"""Training in several processes; without a process group nothing is exchanged."""

from rarefy.distributed.agreement import (
    agreed_seed,
    differing,
    failing_together,
    from_all,
    highest_of_all,
    is_first,
    join_processes,
    lost_another,
    mean_over_ranks,
    of_first,
    place,
    ranks,
    wait_for_all,
)
from rarefy.distributed.checksums import combined
from rarefy.distributed.means import Traffic, means_over_ranks
from rarefy.distributed.parallel import Parallel, ParallelConfig
from rarefy.distributed.shards import (
    WHOLE_WEIGHTS,
    Cut,
    are_cut_alike,
    cut_by,
    is_cut,
    local_part,
    outside_of_fully_shard,
    reshard,
    summed,
    whole,
)

__all__ = [
    "WHOLE_WEIGHTS",
    "Cut",
    "Parallel",
    "ParallelConfig",
    "Traffic",
    "agreed_seed",
    "are_cut_alike",
    "combined",
    "cut_by",
    "differing",
    "failing_together",
    "from_all",
    "highest_of_all",
    "is_cut",
    "is_first",
    "join_processes",
    "local_part",
    "lost_another",
    "mean_over_ranks",
    "means_over_ranks",
    "of_first",
    "outside_of_fully_shard",
    "place",
    "ranks",
    "reshard",
    "summed",
    "wait_for_all",
    "whole",
]
