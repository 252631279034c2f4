"""By what a gradient was multiplied since it was collected: a loss scale that was taken out, a clipped norm."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from rarefy.distributed import ranks
from rarefy.storage.protocol import Storage
from rarefy.storage.sharded import ShardedStorage

_SAMPLES = 1 << 16
_COMPARED = 64
# More than bfloat16 rounds by, less than any clipping that matters.
_ROUNDING = 0.02


def factor_since(storage: Storage, grad: Tensor, collected: Any) -> float:
    """The factor that makes what was collected the gradient that is there now; all processes must ask.

    Args:
        storage: of the weight.
        grad: of the weight, zero at inactive connections.
        collected: the dense gradient, in the shape of the weight; anything else tells nothing.

    Returns:
        0 where the gradient was zeroed since; 1 where it was changed in another way, as by averaging it.
    """
    is_whole = not isinstance(storage, ShardedStorage)
    # In several processes the gradient of a whole weight is an average.
    if not isinstance(collected, Tensor) or (ranks() > 1 and is_whole):
        return 1.0
    factor = _own_factor(storage, grad, collected)
    return storage.agreed(factor) if isinstance(storage, ShardedStorage) else factor


def _own_factor(storage: Storage, grad: Tensor, collected: Tensor) -> float:
    """The factor as far as this process can tell."""
    now = storage.collect(grad.detach())
    before = storage.collect(collected)
    ratio = _shared_ratio(now, before)
    if ratio is not None:
        return _without_rounding(ratio)
    # A piece of a weight may have no gradient by itself, and others cannot be asked by one process alone.
    may_be_zeroed = not isinstance(storage, ShardedStorage) and not now.any()
    return 0.0 if may_be_zeroed and bool(storage.spread(before)[storage.mask].any()) else 1.0


def is_multiple(tensor: Tensor, other: Tensor) -> bool:
    """Whether `tensor` is `other` times a positive number, as far as the largest sampled entries tell.

    Args:
        tensor: any shape.
        other: the shape of `tensor`.

    Example:
        >>> import torch
        >>> is_multiple(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 2.0]))
        True
        >>> is_multiple(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 6.0]))
        False
    """
    ratio = _shared_ratio(tensor, other)
    return ratio is not None and ratio > 0


def _without_rounding(ratio: float) -> float:
    power = math.log2(abs(ratio))
    return math.copysign(2.0 ** round(power), ratio) if abs(power - round(power)) < _ROUNDING else ratio


def _shared_ratio(tensor: Tensor, other: Tensor) -> float | None:
    """By how much the largest sampled entries of `tensor` are larger; None where they do not agree."""
    stride = max(1, tensor.numel() // _SAMPLES)
    now = tensor.flatten()[::stride]
    before = other.flatten()[::stride]
    places = now.abs().topk(min(_COMPARED, now.numel())).indices
    # In double: a ratio of float32 has rounding of its own.
    ratios = now[places].double() / before[places].double()
    ratios = ratios[ratios.isfinite() & (ratios != 0)]
    if not len(ratios):
        return None
    middle = float(ratios.median())
    is_common = float(((ratios / middle - 1).abs() < _ROUNDING).double().mean()) > 0.9
    return middle if is_common else None
