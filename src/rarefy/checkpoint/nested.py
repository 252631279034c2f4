"""Nested values as a JSON skeleton plus a flat dict of tensors, and back, exactly.

JSON has no tuples, no infinities, no keys but strings and no tensors. Those become objects with the key `$`:

    (1, 2)            {"$": "tuple", "items": [1, 2]}
    {0: "a"}          {"$": "dict", "items": [[0, "a"]]}
    inf               {"$": "float", "value": "inf"}
    a tensor          {"$": "tensor", "name": "state.0.exp_avg"}

Tensors that are the same view of the same storage (tied weights) share one name, and one tensor once loaded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rarefy.distributed import local_part

Json: TypeAlias = Any
StorageKey: TypeAlias = tuple[Any, ...]
TAG = "$"
# The place of a value that is a tensor itself, and what safetensors keeps in its header.
RESERVED_NAMES = ("", "__metadata__")


def split(value: Any) -> tuple[Json, dict[str, Tensor]]:
    """Skeleton and tensors of a nested value.

    Args:
        value: dicts, lists, tuples, None, bools, ints, floats, strings and tensors, nested at will.

    Returns:
        What JSON can hold, and the tensors by name. The tensors are the caller's own, not copies.

    Raises:
        TypeError: for anything else, naming the place.

    Example:
        >>> import torch
        >>> split({"lr": 0.1, "betas": (0.9, 0.99), "state": [torch.ones(2)]})[0]["state"]
        [{'$': 'tensor', 'name': 'state.0'}]
    """
    tensors = _TensorNames()
    return _encode(value, "", tensors), tensors.by_name


def join(skeleton: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The nested value that `split` took apart.

    Args:
        skeleton: the first result of `split`.
        tensors: the second.

    Raises:
        KeyError: when a tensor is missing or a tag is unknown.

    Example:
        >>> join(*split({0: (None, float("-inf"))}))
        {0: (None, -inf)}
    """
    if isinstance(skeleton, list):
        return [join(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if TAG in skeleton:
        return _DECODERS[skeleton[TAG]](skeleton, tensors)
    return {key: join(item, tensors) for key, item in skeleton.items()}


class _TensorNames:
    """Gives each distinct tensor a name after its place."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._name_of: dict[StorageKey, str] = {}

    def name(self, tensor: Tensor, place: str) -> str:
        key = _storage_key(tensor, place)
        if key not in self._name_of:
            self._name_of[key] = self._free(place)
            self.by_name[self._name_of[key]] = tensor
        return self._name_of[key]

    def _free(self, place: str) -> str:
        name = place
        count = 1
        # Two places may have one name: the keys 1 and "1", or "a.b" and b in a.
        while name in self.by_name or name in RESERVED_NAMES:
            count += 1
            name = f"{place}#{count}"
        return name


def _storage_key(tensor: Tensor, place: str) -> StorageKey:
    """Equal for two tensors only when both are the same view of the same memory."""
    # A tensor that is cut over processes has no address itself.
    cut = tensor
    tensor = local_part(tensor)
    is_strided = tensor.layout is torch.strided
    # An empty piece lies in memory as long as the others', and two weights that are tied are so in each process.
    if tensor is not cut and is_strided and tensor.numel() == 0:
        address = tensor.untyped_storage().data_ptr()
        return (place, "alone") if address == 0 else (cut.shape, cut.dtype, address)
    # Empty tensors all have the address 0, and sparse ones have none.
    if tensor.numel() == 0 or not is_strided:
        return (place, "alone")
    # A lazily conjugated or negated tensor shares memory and strides with the plain one, but not its values.
    view = (tensor.shape, tensor.stride(), tensor.dtype, tensor.is_conj(), tensor.is_neg())
    return (tensor.device, tensor.data_ptr(), *view)


def _encode(value: Any, place: str, tensors: _TensorNames) -> Json:
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {TAG: "float", "value": str(float(value))}
    if isinstance(value, Tensor):
        return {TAG: "tensor", "name": tensors.name(value, place)}
    if isinstance(value, (list, tuple)):
        items = [_encode(item, _below(place, index), tensors) for index, item in enumerate(value)]
        return {TAG: "tuple", "items": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        return _encode_dict(value, place, tensors)
    raise TypeError(f"{place or 'value'} holds a {type(value).__name__}")


def _encode_dict(value: dict[Any, Any], place: str, tensors: _TensorNames) -> Json:
    items = [(key, _encode(item, _below(place, key), tensors)) for key, item in value.items()]
    # A dict of the user's own with the key `$` would be taken for one of the tagged objects.
    if TAG not in value and all(isinstance(key, str) for key in value):
        return dict(items)
    return {TAG: "dict", "items": [[_encode(key, f"a key of {place}", tensors), item] for key, item in items]}


def _below(place: str, key: object) -> str:
    return f"{place}.{key}" if place else str(key)


def _join_items(skeleton: dict[str, Any], tensors: Mapping[str, Tensor]) -> list[Any]:
    return join(skeleton["items"], tensors)


_DECODERS: Mapping[str, Callable[[dict[str, Any], Mapping[str, Tensor]], Any]] = {
    "tuple": lambda skeleton, tensors: tuple(_join_items(skeleton, tensors)),
    "dict": lambda skeleton, tensors: {key: item for key, item in _join_items(skeleton, tensors)},
    "float": lambda skeleton, _: float(skeleton["value"]),
    "tensor": lambda skeleton, tensors: tensors[skeleton["name"]],
}
