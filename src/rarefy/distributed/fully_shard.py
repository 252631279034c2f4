"""`strategy: fsdp2`: a model cut in pieces by torch's `fully_shard`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from rarefy.distributed.agreement import ranks
from rarefy.errors import ConfigError


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model: what is gathered for its forward pass and put away after it, one by one.

    They are the elements of the outermost module lists whose elements are all of one kind, as the layers of a
    transformer are. A list of which any weight is used elsewhere too is left to the whole model.

    Example:
        >>> model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])})
        >>> len(blocks_of(model)), blocks_of(nn.Linear(2, 2))
        (2, [])
    """
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            inside |= set(module.modules())
            blocks = list(module)
            if len({type(block) for block in blocks}) == 1 and all(map(_has_weights, blocks)):
                found += blocks
    return found if _share_nothing(model, found) else []


def _has_weights(block: nn.Module) -> bool:
    return next(block.parameters(), None) is not None


def _share_nothing(model: nn.Module, blocks: list[nn.Module]) -> bool:
    """Whether no parameter is in two blocks, or in one and outside of all."""
    inside = {module for block in blocks for module in block.modules()}
    owners = [list(block.parameters()) for block in blocks]
    rest = [
        [parameter for parameter in module.parameters(recurse=False)]
        for module in model.modules()
        if module not in inside
    ]
    counted = [parameter for group in owners for parameter in group]
    outside = {parameter for group in rest for parameter in group}
    return len(set(counted)) == len(counted) and outside.isdisjoint(counted)


def cut_model(
    model: nn.Module,
    device: torch.device,
    shard_size: int | None,
    param_dtype: torch.dtype | None,
    reshard_after_forward: bool | None,
    cpu_offload: bool = False,
) -> None:
    """Cuts a model in pieces: each of its blocks, and what is left.

    Args:
        model: on its device; changed in place.
        device: of this process.
        shard_size: how many processes share a copy of the model; None for all.
        param_dtype: of gathered weights and what is computed with them; gradients are averaged in float32.
        reshard_after_forward: whether gathered weights are put away after the forward pass; None leaves it to torch.
        cpu_offload: whether pieces of weights, their gradients and optimizer states are kept in the CPU's memory.

    Raises:
        ConfigError: a `shard_size` that does not divide the number of processes.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options: dict[str, Any] = {"mesh": _mesh(device, shard_size)}
    if param_dtype is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    if cpu_offload:
        # Pinned memory is for copies to another device, without which torch has none.
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type != "cpu")
    later: Mapping[str, Any] = (
        {} if reshard_after_forward is None else {"reshard_after_forward": reshard_after_forward}
    )
    # From the inside out: `fully_shard` of the model takes what no block has taken.
    for block in blocks_of(model):
        fully_shard(block, **options, **later)
    fully_shard(model, **options, **later)


def _mesh(device: torch.device, shard_size: int | None) -> Any:
    count = ranks()
    if shard_size is None or shard_size == count:
        return init_device_mesh(device.type, (count,))
    if count % shard_size:
        allowed = f"a number that divides the {count} processes"
        raise ConfigError("parallel.shard_size", str(shard_size), allowed, "shard_size: 2")
    # torch copies along the first dimension, and cuts along the second.
    return init_device_mesh(
        device.type, (count // shard_size, shard_size), mesh_dim_names=("copies", "pieces")
    )
