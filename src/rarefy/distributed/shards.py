"""Weights that are cut in pieces, of which each process holds one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rarefy.torch_private import is_part_of_a_flat_parameter
from rarefy.torch_private.ddp import is_distributed_by_hand

WHOLE_WEIGHTS = (
    "sparsity needs whole weights in each process, or pieces that fully_shard cuts: wrap the model in "
    "DistributedDataParallel, or call torch.distributed.fsdp.fully_shard on it"
)
"""What to do about a weight that something else cuts in pieces."""


def is_cut(tensor: Any) -> bool:
    """Whether a tensor is a DTensor, of which each process holds a part.

    Example:
        >>> is_cut(torch.ones(1))
        False
    """
    # Where the module was never imported, there is no such tensor, and importing it takes long.
    tensors = sys.modules.get("torch.distributed.tensor")
    return tensors is not None and isinstance(tensor, tensors.DTensor)


def are_cut_alike(tensors: Iterable[Tensor]) -> bool:
    """Whether all are DTensors whose pieces lie in the same processes.

    Example:
        >>> are_cut_alike([torch.ones(1)])
        False
    """
    given = list(tensors)
    if not given or not all(map(is_cut, given)):
        return False
    cuts = [Cut.of(one) for one in given]
    first = cuts[0]
    return all(one.mesh == first.mesh and one.mesh_dimension == first.mesh_dimension for one in cuts)


def cut_by(weight: Tensor, module: nn.Module | None = None) -> str:
    """What cut a weight in pieces that cannot be used; empty where it is whole, or cut as `fully_shard` does it.

    Args:
        weight: a parameter, or what a module has in its place.
        module: that holds it.

    Example:
        >>> cut_by(nn.Linear(2, 2).weight)
        ''
    """
    if is_part_of_a_flat_parameter(weight):
        return "a part of a flat parameter (as FullyShardedDataParallel makes it)"
    if not is_cut(weight):
        return ""
    if _cut_dimension(weight) is None:
        return "a DTensor that is not cut along one dimension (as tensor parallelism makes it, with fully_shard too)"
    if module is not None and is_distributed_by_hand(module):
        return "a DTensor of tensor parallelism"
    return ""


def outside_of_fully_shard(model: nn.Module) -> set[nn.Module]:
    """The modules of a model that are in none that `fully_shard` was called on.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> len(outside_of_fully_shard(model))
        2
    """
    inside = {inner for module in _called_on(model) for inner in module.modules()}
    return set(model.modules()) - inside


def _called_on(model: nn.Module) -> list[Any]:
    # As above: without the import there can be none.
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def _cut_dimension(weight: Any) -> int | None:
    """The dimension of a DTensor that is cut, along one dimension of its mesh; None where it is cut in another way."""
    # Exactly this class: a strided shard holds other rows.
    kinds = [type(placement).__name__ for placement in weight.placements]
    if kinds.count("Shard") != 1 or set(kinds) - {"Shard", "Replicate"}:
        return None
    return weight.placements[kinds.index("Shard")].dim


def local_part(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, as a view; any other tensor as it is.

    Example:
        >>> local_part(torch.ones(2))
        tensor([1., 1.])
    """
    if not is_cut(tensor):
        return tensor
    cut: Any = tensor
    # `to_local` can be differentiated, and a piece is only looked at.
    with torch.no_grad():
        return cut.to_local()


def reshard(model: nn.Module) -> None:
    """Puts the pieces of a model in the place of weights that were gathered for a forward pass."""
    for module in _called_on(model):
        module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """The whole of a DTensor, for which all processes must ask; any other tensor as it is.

    Example:
        >>> whole(torch.ones(2))
        tensor([1., 1.])
    """
    return Cut.of(tensor).whole(local_part(tensor)) if is_cut(tensor) else tensor


def summed(number: Tensor) -> Tensor:
    """A scalar of which each process may have a part, in whole.

    Example:
        >>> summed(torch.tensor(2.0))
        tensor(2.)
    """
    cut: Any = number
    return cut.full_tensor() if is_cut(number) else number


@dataclass(frozen=True)
class Cut:
    """How `fully_shard` cuts a weight: along one dimension in equal pieces, of which the last may be short or empty.

    Args:
        shape: of the whole weight.
        stride: of the whole weight.
        mesh: the processes, in torch's form.
        placements: for each dimension of the mesh whether it cuts the weight.
        device: where the piece of this process is.
    """

    shape: torch.Size
    stride: tuple[int, ...]
    mesh: Any
    placements: Sequence[Any]
    device: torch.device

    @classmethod
    def of(cls, weight: Any) -> Cut:
        """The cut of a DTensor."""
        device = local_part(weight).device
        return cls(weight.shape, tuple(weight.stride()), weight.device_mesh, tuple(weight.placements), device)

    @cached_property
    def mesh_dimension(self) -> int:
        """The dimension of the mesh along which the pieces lie."""
        return [type(placement).__name__ for placement in self.placements].index("Shard")

    @property
    def pieces(self) -> int:
        """How many there are."""
        return self.mesh.size(self.mesh_dimension)

    @property
    def dimension(self) -> int:
        """The dimension of the weight that is cut."""
        return self.placements[self.mesh_dimension].dim

    @property
    def group(self) -> dist.ProcessGroup:
        """The processes that hold a piece each."""
        return self.mesh.get_group(self.mesh_dimension)

    @cached_property
    def bounds(self) -> tuple[int, int]:
        """From where to where the piece of this process goes."""
        size = self.shape[self.dimension]
        # As torch's `chunk` cuts: the last pieces may be shorter, or empty.
        length = -(-size // self.pieces)
        start = min(self.mesh.get_local_rank(self.mesh_dimension) * length, size)
        return start, min(start + length, size)

    def own(self, whole: Tensor) -> Tensor:
        """The piece of this process, a view of a tensor of the weight's shape."""
        start, stop = self.bounds
        return whole.narrow(self.dimension, start, stop - start)

    def wrap(self, piece: Tensor) -> Tensor:
        """A DTensor of the weight's shape of which this is the piece here."""
        tensors: Any = sys.modules["torch.distributed.tensor"]
        # Unchecked, as the check would exchange; shape and stride given, as pieces may be uneven.
        wrapped = tensors.DTensor.from_local(
            piece, self.mesh, self.placements, run_check=False, shape=self.shape, stride=self.stride
        )
        # torch moves it to the devices of the mesh, also where the weight is kept on the CPU (`CPUOffloadPolicy`).
        return wrapped if wrapped.device == piece.device else wrapped.to(piece.device)

    def whole(self, piece: Tensor) -> Tensor:
        """The tensor of which all processes bring their pieces; all must call it.

        Args:
            piece: of any dtype.
        """
        # Not every process group sends bool.
        sent = piece.view(torch.uint8) if piece.dtype == torch.bool else piece
        gathered: Any = self.wrap(sent.contiguous().to(self.mesh.device_type))
        with torch.no_grad():
            whole = gathered.full_tensor().to(piece.device)
        return whole.view(torch.bool) if piece.dtype == torch.bool else whole

    def places(self, entries: Tensor) -> Tensor:
        """Where entries of the piece here stand in the flattened weight.

        Args:
            entries: int64, places in the flattened piece.
        """
        start, stop = self.bounds
        inner = self.shape[self.dimension + 1 :].numel()
        own = max((stop - start) * inner, 1)
        # Flattened, a piece is [outer, cut, inner]: of the three the middle one is shifted, and longer in the whole.
        outer = entries.div(own, rounding_mode="floor")
        return outer * self.shape[self.dimension] * inner + start * inner + entries % own

    def gathered(self, *numbers: float) -> list[list[float]]:
        """A row of numbers for each piece, in order; all processes must call it.

        Args:
            numbers: as many in each process, whole ones below 2^53.
        """
        rows = torch.zeros(self.pieces, len(numbers), dtype=torch.float64, device=self.device)
        own = torch.tensor(numbers, dtype=torch.float64)
        rows[self.mesh.get_local_rank(self.mesh_dimension)] = own.to(self.device)
        return self.sum(rows).tolist()

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of what all processes bring; all must call it."""
        sent = numbers.to(self.mesh.device_type)
        dist.all_reduce(sent, group=self.group)
        return sent.to(numbers.device)
