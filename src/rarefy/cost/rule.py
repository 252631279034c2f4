"""Where compact storage pays: the rule behind `compute: auto`, calibrated or from a table of break-even densities."""

from __future__ import annotations

import dataclasses
import math

import torch

from rarefy.cost.break_even import BreakEven
from rarefy.cost.calibration import key_of, measured
from rarefy.kernels.instruction_sets import REFERENCE, instruction_set

_OVERHEAD = 5e6  # of a call, with one thread; a product on n threads does n times as much in that time
_MARGIN = 1.03  # a layer is left dense unless it is expected to gain this factor


# Against torch's dense products on a machine with AVX-512 and bfloat16 instructions; lower than measured, never higher.
TABLE: dict[tuple[str, torch.dtype], BreakEven] = {
    ("v4", torch.float32): BreakEven(0.65, 8, _OVERHEAD),
    ("v3", torch.float32): BreakEven(0.55, 10, _OVERHEAD),
    ("v2", torch.float32): BreakEven(0.25, 8, _OVERHEAD),
    ("base", torch.float32): BreakEven(0.5, 8, _OVERHEAD),
    ("v4", torch.bfloat16): BreakEven(0.28, 16, _OVERHEAD),
    ("v3", torch.bfloat16): BreakEven(0.2, 16, _OVERHEAD),
    ("v2", torch.bfloat16): BreakEven(0.08, 16, _OVERHEAD),
    ("base", torch.bfloat16): BreakEven(0.2, 16, _OVERHEAD),
}


def rule(dtype: torch.dtype) -> BreakEven | None:
    """The rule in use: what `rarefy bench --calibrate` measured for this process, else the package's table.

    Args:
        dtype: of the activations.

    Returns:
        None where there is no kernel for the dtype.

    Example:
        >>> rule(torch.float64) is None
        True
    """
    ours = None if instruction_set() == REFERENCE else TABLE.get((instruction_set(), dtype))
    if ours is None:
        return None
    cautious = dataclasses.replace(ours, overhead=ours.overhead * torch.get_num_threads())
    return measured().get(key_of(dtype), cautious)


def relative_time(
    rows: int, columns: int, tokens: int, density: float, dtype: torch.dtype = torch.float32
) -> float:
    """Expected time of a sparse layer's forward and backward pass, dense = 1; infinite without a kernel for it.

    density / limit · (1 + tokens_offset / tokens) + overhead / (rows · columns · tokens)

    Args:
        rows: rows of the weight (output features).
        columns: columns of the weight (input features).
        tokens: rows of the activations per step, ≥ 0.
        density: share of active connections, in [0, 1].
        dtype: of the activations (autocast's dtype under autocast).

    Example:
        >>> relative_time(768, 768, 2048, 0.1, torch.float64)
        inf
    """
    found = rule(dtype)
    if found is None or rows * columns * tokens == 0:
        return math.inf
    return found.relative_time(rows, columns, tokens, density)


def pays_off(
    rows: int, columns: int, tokens: int, density: float, dtype: torch.dtype = torch.float32
) -> bool:
    """Whether compact storage is expected to be at least 3% faster than dense for this layer; see `relative_time`.

    Example:
        >>> pays_off(768, 768, 2048, 0.99)
        False
    """
    return relative_time(rows, columns, tokens, density, dtype) * _MARGIN < 1


def break_even_sparsity(rows: int, columns: int, tokens: int, dtype: torch.dtype = torch.float32) -> float:
    """The sparsity above which compact storage pays for this layer; 1 where it never does.

    Example:
        >>> break_even_sparsity(768, 768, 2048, torch.float64)
        1.0
    """
    fixed = relative_time(rows, columns, tokens, 0.0, dtype)
    if fixed * _MARGIN >= 1:
        return 1.0
    slope = relative_time(rows, columns, tokens, 1.0, dtype) - fixed
    return max(0.0, 1 - (1 / _MARGIN - fixed) / slope)
