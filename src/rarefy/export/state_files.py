"""State dicts as files: a torch file, safetensors, values and indices."""

from __future__ import annotations

import io
from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy.checkpoint.csr_file import encode_csr
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.manifest import write_file
from rarefy.checkpoint.saved_model import SavedModel
from rarefy.checkpoint.tensor_file import encode_tensors, snapshot
from rarefy.export.job import Fill, Job

# Of a column; few weights have more than 65,536 of them.
INDEX_BYTES = 2


def dense(job: Job) -> Fill:
    """A file for `torch.load(path, weights_only=True)`: the state dict, tied tensors stored once."""
    saved = job.saved
    buffer = io.BytesIO()
    # torch.save writes all the memory that a tensor is a view of.
    copies = {name: tensor.clone() for name, tensor in saved.dense.items() if name not in saved.tied}
    torch.save({name: copies[saved.tied.get(name, name)] for name in saved.dense}, buffer)
    return lambda path: write_file(path, [buffer.getbuffer()])


def safetensors(job: Job) -> Fill:
    """A safetensors file of the state dict, tied tensors stored under each of their names."""
    tensors = _storable(job.saved, job.saved.dense)
    return lambda path: write_file(path, encode_tensors(tensors, {"format": "pt"}))


def csr(job: Job) -> Fill:
    """A file for `load_csr`; weights without a mask become values and indices too where that is smaller.

    Raises:
        CheckpointError: no weight is sparse.
    """
    saved = job.saved
    state = {name: tensor for name, tensor in saved.dense.items() if name not in saved.tied}
    active = {name: saved.active(name) for name in state if name in saved.masks or _is_smaller(state[name])}
    if not active:
        problem = "is dense: no weight has a mask or enough zeros"
        raise CheckpointError(saved.path, problem, "give a sparse one, or --to safetensors")
    tied = {name: stored for name, stored in saved.tied.items() if name in saved.dense}
    tensors = _storable(saved, state)
    return lambda path: write_file(path, encode_csr(tensors, active, tied))


def _is_smaller(weight: Tensor) -> bool:
    """Whether values and indices of the nonzero entries are smaller than the weight."""
    if weight.dim() < 2 or not weight.is_floating_point():
        return False
    return (
        int((weight != 0).sum()) * (weight.element_size() + INDEX_BYTES)
        < weight.numel() * weight.element_size()
    )


def _storable(saved: SavedModel, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    try:
        return snapshot(state)
    except TypeError as error:
        raise CheckpointError(saved.path, f"cannot be exported: {error}", "use --to dense") from error
