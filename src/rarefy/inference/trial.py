"""A quick trial: how long a product takes with a dense weight and with the same weight in compact storage."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from rarefy.tensors import SparseWeight

Clock = Callable[[], float]
_SECONDS = 0.1  # that one trial takes, about
_FEWEST = 5
_MOST = 50


@torch.no_grad()
def speed_up(
    dense: Sequence[Tensor], sparse: Sequence[SparseWeight], tokens: int, clock: Clock = time.perf_counter
) -> float:
    """How many times faster the sparse weights multiply than the dense ones, in turns; median.

    All weights are gone through in each turn, so that many large ones come from memory, as in their model.

    Args:
        dense: weights of one shape, [out, in], or [in, out] where the sparse ones are transposed.
        sparse: the same weights in compact storage.
        tokens: rows of the activations, ≥ 1.
        clock: what the time is read from.

    Example:
        >>> dense = [torch.eye(8)]
        >>> speed_up(dense, [SparseWeight.from_dense(one, one != 0) for one in dense], tokens=1) > 0
        True
    """
    is_transposed = sparse[0].topology.is_transposed
    inputs = dense[0].shape[0 if is_transposed else 1]
    x = torch.randn(tokens, inputs, dtype=torch.float32).to(dense[0].dtype)
    multiply = _transposed if is_transposed else F.linear
    # It also wakes threads and caches, so what it tells is only how often to repeat.
    turn = sum(_time(multiply, x, weights, clock) for weights in (dense, sparse))
    turns = min(_MOST, max(_FEWEST, round(_SECONDS / max(turn, 1e-6))))
    ratios = []
    for _ in range(turns):
        of_dense = _time(multiply, x, dense, clock)
        ratios.append(of_dense / _time(multiply, x, sparse, clock))
    # Imported late: it brings fractions, decimals and random numbers along.
    from statistics import median

    return median(ratios)


def _transposed(x: Tensor, weight: Tensor) -> Tensor:
    return x @ weight


def _time(
    multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weights: Sequence[Tensor], clock: Clock
) -> float:
    """Seconds of one product with each weight; never zero, whatever the clock's resolution."""
    start = clock()
    for weight in weights:
        multiply(x, weight)
    return max(clock() - start, 1e-9)
