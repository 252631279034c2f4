"""Tensors in the safetensors format, written in a stream so that one pass both stores and hashes them.

A file is eight bytes of header length, a JSON header (dtype, shape and byte range of each tensor), the bytes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from rarefy.checkpoint.packed import unpack

CHUNK_BYTES = 1 << 22
ALIGNMENT = 8
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies in CPU memory that later training steps cannot change; contiguous whatever the originals are.

    Args:
        tensors: dense tensors of any shape, device and a dtype in `DTYPE_NAMES`.

    Raises:
        TypeError: for sparse, quantized or meta tensors and other dtypes, naming the tensor.

    Example:
        >>> weights = torch.zeros(2); copy = snapshot({"w": weights}); _ = weights.add_(1); copy["w"].tolist()
        [0.0, 0.0]
    """
    for name, tensor in tensors.items():
        _check_storable(name, tensor)
    return {name: _copy(tensor) for name, tensor in tensors.items()}


def in_memory(name: str, tensor: Tensor) -> Tensor:
    """A tensor itself where it is contiguous in CPU memory, else such a copy.

    Raises:
        TypeError: as for `snapshot`.

    Example:
        >>> in_memory("w", torch.ones(2, 3).T).is_contiguous()
        True
    """
    _check_storable(name, tensor)
    return tensor.cpu().contiguous()


def encode_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, in chunks of at most 4 MiB.

    Args:
        tensors: contiguous CPU tensors, as `snapshot` returns them.
        metadata: texts for the header.

    Example:
        >>> len(b"".join(encode_tensors({"w": torch.zeros(2)})))
        80
    """
    # The largest elements first, as safetensors does: every tensor then begins at a multiple of its element size.
    ordered = sorted(tensors, key=lambda name: -tensors[name].element_size())
    yield _header({name: tensors[name] for name in ordered}, metadata)
    for name in ordered:
        # As bytes, because NumPy has no bfloat16; flat first, because a scalar cannot be seen in another dtype.
        data = tensors[name].reshape(-1).view(torch.uint8).numpy().data
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in CPU memory; those that were packed as they were.

    Raises:
        KeyError, ValueError: what was packed is not what the header says.
    """
    return unpack(load_file(path), read_metadata(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def _check_storable(name: str, tensor: Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
        raise TypeError(f"{name} is not an ordinary dense tensor")
    if tensor.dtype not in DTYPE_NAMES:
        raise TypeError(f"{name} is {tensor.dtype}, which safetensors cannot hold")


def _copy(tensor: Tensor) -> Tensor:
    # `cpu()` copies nothing that is there already, and `clone` keeps strides, which the file cannot express.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start = end
        end += tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    # So that the data begin where the widest numbers may begin in memory.
    padded = text + b" " * (-len(text) % ALIGNMENT)
    return len(padded).to_bytes(8, "little") + padded
