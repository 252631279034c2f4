"""A checkpoint read in pieces: of each tensor no more than this process needs, whichever processes wrote it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rarefy.distributed import Cut

Wanted = Callable[[str, torch.Size], Cut | None]
"""Of a name and the whole shape of what a file has for it: how it is cut here, or None for the whole of it."""


def read_cut(path: Path, part: str, wanted: Wanted) -> dict[str, Tensor]:
    """The tensors of a part of a checkpoint: DTensors of which no more than the pieces here were read, others whole.

    Args:
        path: a checkpoint, whose files have been verified.
        part: one of `PART_NAMES`.
        wanted: how tensors are cut here.

    Raises:
        CheckpointError, KeyError, ValueError: a file lacks what it should have.
    """
    # Here, as importing torch's takes long, and only processes that hold pieces need it.
    from torch.distributed.checkpoint import DefaultLoadPlanner

    from rarefy.checkpoint.dcp.part_reader import PartReader

    reader = PartReader(path, part)
    metadata = reader.read_metadata()
    described: dict[str, Any] = dict(metadata.state_dict_metadata)
    found = {
        name: _place(one, wanted(name, one.size) if one.size else None) for name, one in described.items()
    }
    planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    # Not by torch's `load`, which in older versions exchanges plans: no process needs to know what others read.
    planner.set_up_planner(found, metadata, is_coordinator=True)
    plans = planner.create_global_plan([planner.create_local_plan()])
    reader.read_data(planner.finish_plan(plans[0]), planner).wait()
    return found


def _place(described: Any, cut: Cut | None) -> Tensor:
    """Where a tensor is read to."""
    shape = described.size
    dtype = described.properties.dtype
    if cut is None:
        return torch.empty(shape, dtype=dtype)
    start, stop = cut.bounds
    own = [stop - start if dimension == cut.dimension else size for dimension, size in enumerate(shape)]
    return cut.wrap(torch.empty(own, dtype=dtype, device=cut.device))
