"""Sparse weights as values and indices in a safetensors file, which every safetensors library can read.

A sparse weight `fc.weight`, seen as a matrix of its first dimension and all others, becomes

    fc.weight/values     its active connections, row by row
    fc.weight/columns    the column of each of them
    fc.weight/starts     for each row the place of its first value, and at the end the number of values

Indices are U16 where they fit, else I32 or I64. Every other tensor is stored as it is. The header says which
weights are sparse, their shapes, and which tensors are other names of the same one: `format` is "rarefy-csr",
`version` "1", and `layout` a JSON text such as

    {"sparse": {"fc.weight": [512, 128]}, "tied": {"head.weight": "embedding.weight"}}
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from rarefy.checkpoint.error import CheckpointError, NewerFormatError
from rarefy.checkpoint.mask_names import free_mask_name
from rarefy.checkpoint.tensor_file import encode_tensors, read_metadata, read_tensors

FORMAT = "rarefy-csr"
VERSION = 1
PARTS = ("values", "columns", "starts")


@dataclass(frozen=True)
class Connections:
    """The active connections of one weight, row by row.

    Args:
        values: one number each.
        columns: the column of each.
        starts: for each row the place of its first value; at the end, their number.
    """

    values: Tensor
    columns: Tensor
    starts: Tensor

    @classmethod
    def of(cls, weight: Tensor, active: Tensor) -> Connections:
        """What is active in a weight.

        Args:
            weight: of any shape; more than two dimensions are seen as a matrix of the first and all others.
            active: bool, of the same shape.

        Example:
            >>> Connections.of(torch.tensor([[0.0, 5.0], [7.0, 0.0]]), torch.eye(2).flip(0).bool()).columns
            tensor([1, 0], dtype=torch.uint16)
        """
        size = _matrix_size(weight.shape)
        chosen = active.reshape(size)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), chosen.sum(1).cumsum(0)])
        columns = chosen.nonzero()[:, 1]
        # Older torch does not index the small float types.
        bits = weight.reshape(size).view(torch.int8) if weight.element_size() == 1 else weight.reshape(size)
        values = bits[chosen].view(weight.dtype)
        return cls(values, _narrowed(columns, size[1] - 1), _narrowed(starts, len(columns)))

    def weight_and_mask(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The dense weight with exact zeros, and the mask.

        Raises:
            ValueError: the indices do not describe a weight of this shape.
        """
        size = _matrix_size(shape)
        # torch has hardly any arithmetic for uint16.
        counts = self.starts.long().diff()
        columns = self.columns.long()
        # A negative index would be taken from the end without an error, and the weight be silently wrong.
        fits = len(counts) == size[0] and not (counts < 0).any() and counts.sum() == len(columns)
        if not fits or len(columns) != len(self.values) or not _all_below(columns, size[1]):
            raise ValueError(f"indices that do not fit the shape {list(shape)}")
        rows = torch.arange(size[0]).repeat_interleave(counts)
        weight = self.values.new_zeros(size)
        mask = torch.zeros(size, dtype=torch.bool)
        weight[rows, columns] = self.values
        mask[rows, columns] = True
        # Of two values at one place one would be lost without a word.
        if int(mask.count_nonzero()) != len(columns):
            raise ValueError("two values at one place")
        return weight.reshape(shape), mask.reshape(shape)

    @property
    def parts(self) -> dict[str, Tensor]:
        """The tensors by the last part of their names."""
        return {part: getattr(self, part) for part in PARTS}


def encode_csr(
    state: Mapping[str, Tensor], active: Mapping[str, Tensor], tied: Mapping[str, str]
) -> Iterator[bytes | memoryview]:
    """The bytes of a file.

    Args:
        state: the dense state dict, without masks; contiguous CPU tensors, as `snapshot` returns them.
        active: for each weight that becomes values and indices, its active connections.
        tied: further names of tensors: name → the name under which it is stored.
    """
    tensors = {name: value for name, value in state.items() if name not in active and name not in tied}
    for name, mask in active.items():
        parts = Connections.of(state[name], mask).parts
        tensors |= {f"{name}/{part}": value for part, value in parts.items()}
    # Values and indices do not tell the shape: columns without a connection leave no trace.
    layout = {"sparse": {name: list(state[name].shape) for name in active}, "tied": dict(tied)}
    metadata = {"format": FORMAT, "version": str(VERSION), "layout": json.dumps(layout)}
    return encode_tensors(tensors, metadata)


def is_csr(path: Path) -> bool:
    """Whether a safetensors file has weights as values and indices."""
    return read_metadata(path).get("format") == FORMAT


def load_csr(path: str | Path, *, masks: bool = False) -> dict[str, Tensor]:
    """The state dict in a file that `rarefy export --to csr` wrote.

    Args:
        path: the file.
        masks: whether the mask of every sparse weight comes with it, as `<name>_mask`, or
            `<name>_sparsity_mask` where the model has something of that name itself.

    Returns:
        Dense tensors in CPU memory, inactive connections exact zeros.

    Raises:
        CheckpointError: the file is damaged or holds something else.
        NewerFormatError: a newer rarefy wrote it.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        metadata = read_metadata(path)
        tensors = read_tensors(path)
    except SafetensorError as error:
        raise CheckpointError(path, f"is no safetensors file ({error})", "give another file") from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(path, "holds no values and indices", "give a file of rarefy export --to csr")
    try:
        _check_version(path, int(metadata["version"]))
        return _decoded(tensors, json.loads(metadata["layout"]), masks)
    # The layout is JSON that anybody may have edited: whatever is missing or of another type ends up here.
    except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(path, f"is damaged ({error})", "export it once more") from error


def _check_version(path: Path, version: int) -> None:
    if version > VERSION:
        problem = f"has layout {version}; this rarefy reads layouts up to {VERSION}"
        raise NewerFormatError(path, problem, "upgrade rarefy")


def _decoded(tensors: dict[str, Tensor], layout: Any, masks: bool) -> dict[str, Tensor]:
    state = dict(tensors)
    names = {*tensors, *layout["tied"]}
    for name, shape in layout["sparse"].items():
        connections = Connections(*(state.pop(f"{name}/{part}") for part in PARTS))
        state[name], mask = connections.weight_and_mask(shape)
        if masks:
            state[free_mask_name(name, names.__contains__)] = mask
    return state | {name: state[stored] for name, stored in layout["tied"].items()}


def _matrix_size(shape: Sequence[int]) -> tuple[int, int]:
    # A vector has one row, or each of its numbers would need a start of its own.
    rows = shape[0] if len(shape) > 1 else 1
    return rows, prod(shape[1:] if len(shape) > 1 else shape)


def _all_below(indices: Tensor, limit: int) -> bool:
    return bool(((indices >= 0) & (indices < limit)).all())


def _narrowed(indices: Tensor, limit: int) -> Tensor:
    """Indices from 0 to `limit` in the smallest type that holds them."""
    for dtype in (torch.uint16, torch.int32):
        if limit <= torch.iinfo(dtype).max:
            return indices.to(dtype)
    return indices
