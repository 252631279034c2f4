"""A checkpoint that several processes write together, each its pieces, through `torch.distributed.checkpoint`.

torch exchanges who writes what, and that it is written; the first process makes the folder before, and writes the
manifest and renames the folder after. The background of a run exchanges in a process group of its own, and training
goes on in the other. A process that is killed leaves a folder without a manifest, and the checkpoint before it stays
the newest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, Metadata, SavePlan, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from rarefy.checkpoint.dcp.storage_writer import SparseStorageWriter
from rarefy.checkpoint.error import CheckpointError, unwritten
from rarefy.checkpoint.writing.frozen import Frozen, texts_of
from rarefy.distributed import Cut, place


def write_together(frozen: Frozen, keep_last: int | None, group: Any = None) -> None:
    """Writes the pieces of this process, and returns when all are safe on the disk; all processes must call it.

    Args:
        frozen: what this process has.
        keep_last: as for `directory.save`.
        group: the processes that write; None for all.

    Raises:
        CheckpointError: some process could not write.
    """
    writer = _FrozenWriter(frozen, keep_last)
    copies = {
        f"{part}.{name}": copy for part, named in frozen.tensors.items() for name, copy in named.items()
    }
    cuts = {f"{part}.{name}": cut for part, named in frozen.cuts.items() for name, cut in named.items()}
    try:
        save(copies, storage_writer=writer, planner=_Copies(cuts), process_group=group)
    except CheckpointException as failed:
        raise _told(frozen, failed) from None
    finally:
        writer.close()


class _Copies(DefaultSavePlanner):
    """Plans copies of pieces, each of which torch would take for a whole tensor.

    Args:
        cuts: by key, how a tensor is cut.
    """

    def __init__(self, cuts: Mapping[str, Cut]) -> None:
        # Of processes that hold the same piece the first one writes it.
        super().__init__(
            flatten_state_dict=False, flatten_sharded_tensors=False, dedup_save_to_lowest_rank=True
        )
        self._cuts = cuts

    def create_local_plan(self) -> SavePlan:
        """What this process has to write; what is not cut, all have."""
        self.plan = SavePlan([_item(key, copy, self._cuts.get(key)) for key, copy in self.state_dict.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        """The copy itself."""
        return self.state_dict[index.fqn]


def _item(key: str, copy: Tensor, cut: Cut | None) -> WriteItem:
    offsets = [0] * copy.dim()
    if cut is not None:
        offsets[cut.dimension] = cut.bounds[0]
    chunk = ChunkStorageMetadata(torch.Size(offsets), copy.shape)
    whole = copy.shape if cut is None else cut.shape
    data = TensorWriteData(chunk, TensorProperties.create_from_tensor(copy), whole)
    return WriteItem(MetadataIndex(key, offsets), WriteItemType.SHARD, tensor_data=data)


class _FrozenWriter(SparseStorageWriter):
    """Writes beside the pieces what the first process has kept."""

    def __init__(self, frozen: Frozen, keep_last: int | None) -> None:
        super().__init__(frozen.path, keep_last=keep_last)
        self._frozen = frozen

    def texts(
        self,
        metadata: Metadata,
        values: Mapping[str, Any],
        cuts: Mapping[str, Mapping[str, int]],
        writers: int,
    ) -> dict[str, bytes]:
        """The files that hold no tensors."""
        return texts_of(self.step, self._frozen.skeletons, self._frozen.params, cuts, writers)


def _told(frozen: Frozen, failed: CheckpointException) -> CheckpointError:
    """What went wrong here, or in the first process in which something did."""
    here = place()[0]
    rank = here if here in failed.failures else min(failed.failures)
    cause = failed.failures[rank][0]
    if isinstance(cause, CheckpointError):
        return cause
    problem = (cause.strerror if isinstance(cause, OSError) else None) or str(cause)
    of_another = f"process {rank} could not write its pieces: "
    return unwritten(frozen.path, problem if rank == here else of_another + problem)
