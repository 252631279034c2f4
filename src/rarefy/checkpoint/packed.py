"""Tensors that are mostly zeros as their other values and where these are; masks as bits.

    fc.weight         fc.weight.values, and where they are: fc.weight.bits (one bit an entry) or fc.weight.places
                      (int32), whichever is smaller, or the bits of another tensor with entries there
    fc.weight_mask    fc.weight_mask.bits

The header of the file lists what was packed. Bits are compared, not numbers, so that a negative zero stays one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

METADATA_KEY = "packed"
_ENDINGS = (".values", ".bits", ".places")
# Below it nothing is gained that anybody would see, and a file stays readable without this module.
SMALLEST = 1 << 15
# Packed where at least a tenth is saved: a plain tensor can be read by any library.
_WORTHWHILE = 0.9
_SAMPLE = 4096
_INTEGERS: Mapping[int, torch.dtype] = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors in a smaller form, and the text for the header of their file.

    Args:
        tensors: contiguous, in CPU memory; those of fewer than `SMALLEST` entries, or with few zeros, stay as they are.

    Returns:
        Tensors by name, and metadata that is empty where nothing was packed.

    Example:
        >>> mask = torch.rand(256, 256, generator=torch.Generator().manual_seed(0)) < 0.1
        >>> packed, metadata = pack({"w": mask * 1.5, "w_mask": mask})
        >>> sorted(packed), packed["w.values"].numel() == int(mask.sum())
        (['w.values', 'w_mask.bits'], True)
        >>> torch.equal(unpack(packed, metadata)["w"], mask * 1.5)
        True
    """
    packing = _Packing(set(tensors))
    # Masks first: a weight and its optimizer state then need no bits of their own.
    for name in sorted(tensors, key=lambda name: tensors[name].dtype != torch.bool):
        packing.add(name, tensors[name])
    return packing.tensors, {METADATA_KEY: json.dumps(packing.listed)} if packing.listed else {}


def unpack(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors that `pack` was given, bit for bit.

    Args:
        tensors: the first result of `pack`.
        metadata: the second.

    Raises:
        KeyError: a tensor is missing.
        ValueError: a tensor has another size than the header says.
    """
    listed: dict[str, dict[str, Any]] = json.loads(metadata.get(METADATA_KEY, "{}"))
    parts = {part for row in listed.values() for part in (row["at"], row.get("values"))}
    whole = {name: tensor for name, tensor in tensors.items() if name not in parts}
    for name, row in listed.items():
        shape = torch.Size(row["shape"])
        active = _active(tensors[row["at"]], shape.numel())
        whole[name] = (active if "values" not in row else spread(tensors[row["values"]], active)).view(shape)
    return whole


@dataclass
class _Support:
    """Where a packed tensor has entries."""

    name: str
    active: Tensor
    count: int

    def covers(self, active: Tensor) -> bool:
        """Whether each entry has a place here; most supports are told apart by a few entries."""
        return all(
            not bool((active[:end] & ~self.active[:end]).any()) for end in (_SAMPLE, self.active.numel())
        )


@dataclass
class _Packing:
    """What goes into one file."""

    taken: set[str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    listed: dict[str, dict[str, Any]] = field(default_factory=dict)
    _supports: dict[torch.Size, list[_Support]] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Packs a tensor, or takes it as it is."""
        # A model may have a tensor of the very name that a part would get.
        if tensor.numel() < SMALLEST or {f"{name}{end}" for end in _ENDINGS} & self.taken:
            self.tensors[name] = tensor
        elif tensor.dtype == torch.bool:
            self._add_mask(name, tensor)
        else:
            self._add_values(name, tensor)

    def _add_mask(self, name: str, mask: Tensor) -> None:
        active = mask.reshape(-1)
        support = self._new(name, mask.shape, active, int(active.count_nonzero()), "bits")
        self.listed[name] = {"shape": list(mask.shape), "at": support.name}

    def _add_values(self, name: str, tensor: Tensor) -> None:
        size = tensor.element_size()
        # As integers: small float types cannot be indexed everywhere, and a negative zero is no zero.
        flat = tensor.reshape(-1).view(_INTEGERS[size])
        active = flat != 0
        count = int(active.count_nonzero())
        # 32 bits for each place, against one bit for each entry.
        kind = "places" if 32 * count < active.numel() < 1 << 31 else "bits"
        places = 4 * count if kind == "places" else active.numel() // 8
        if count * size + places > _WORTHWHILE * active.numel() * size:
            self.tensors[name] = tensor
            return
        # A shared support may have more places than entries here; zeros at them are stored, up to the cost of its own.
        support = self._shared(tensor.shape, active, count + places // size)
        support = support or self._new(name, tensor.shape, active, count, kind)
        values = f"{name}.values"
        self.tensors[values] = flat[support.active].view(tensor.dtype)
        self.listed[name] = {"shape": list(tensor.shape), "at": support.name, "values": values}

    def _shared(self, shape: torch.Size, active: Tensor, highest: int) -> _Support | None:
        """A support that is there already and costs less than another one."""
        known = [one for one in self._supports.get(shape, []) if one.count <= highest]
        return next((one for one in known if one.covers(active)), None)

    def _new(self, name: str, shape: torch.Size, active: Tensor, count: int, kind: str) -> _Support:
        support = _Support(f"{name}.{kind}", active, count)
        self._supports.setdefault(shape, []).append(support)
        # The lowest bit first, on any machine, as `bits_of` reads them.
        if kind == "bits":
            self.tensors[support.name] = torch.from_numpy(np.packbits(active.numpy(), bitorder="little"))
        else:
            self.tensors[support.name] = active.nonzero().view(-1).int()
        return support


def bits_of(stored: Tensor) -> Tensor:
    """Bool from bytes of bits, eight of each.

    Example:
        >>> bits_of(torch.tensor([5], dtype=torch.uint8)).int().tolist()
        [1, 0, 1, 0, 0, 0, 0, 0]
    """
    return torch.from_numpy(np.unpackbits(stored.numpy(), bitorder="little").view(np.bool_))


def _active(stored: Tensor, size: int) -> Tensor:
    """Bool [size] from bits or places."""
    if stored.dtype == torch.uint8:
        if stored.numel() != (size + 7) // 8:
            raise ValueError(f"{stored.numel()} bytes of bits for {size} entries")
        return bits_of(stored)[:size]
    active = torch.zeros(size, dtype=torch.bool)
    active[stored.long()] = True
    return active


def spread(values: Tensor, active: Tensor) -> Tensor:
    """Values at the places that are active, zeros elsewhere.

    Raises:
        ValueError: there are not as many.

    Example:
        >>> spread(torch.tensor([2.0]), torch.tensor([False, True])).tolist()
        [0.0, 2.0]
    """
    if values.numel() != int(active.count_nonzero()):
        raise ValueError(f"{values.numel()} values for {int(active.count_nonzero())} places")
    integers = _INTEGERS[values.element_size()]
    # Written as integers: not every small float type can be written by a mask.
    whole = torch.zeros(active.numel(), dtype=integers)
    whole[active] = values.view(integers)
    return whole.view(values.dtype)
