"""Checkpoints of rarefy for `torch.distributed.checkpoint`.

Importing it takes long, so rarefy itself does it only where processes hold pieces of a model.
"""

from rarefy.checkpoint.dcp.storage_reader import SparseStorageReader
from rarefy.checkpoint.dcp.storage_writer import SparseStorageWriter

__all__ = ["SparseStorageReader", "SparseStorageWriter"]
