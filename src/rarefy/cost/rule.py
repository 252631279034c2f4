"""Where compact storage pays: the rule behind `compute: auto`, calibrated or from a table of break-even densities."""

from __future__ import annotations

import math

import torch

from rarefy.cost.calibration import BreakEven, kernels_in_use, key_of, measured, processor
from rarefy.kernels.instruction_sets import REFERENCE, available, instruction_set, matrix_units

_OVERHEAD = 5e6  # of a call, with one thread; a product on n threads does n times as much in that time
MARGIN = 1.03  # a layer is left dense unless it is expected to gain this factor

# Against torch's dense products on an AMD processor with AVX-512 and bfloat16 instructions; lower than measured.
# "blocks of 16" have heights and widths that are multiples of 16; measured with 16 x 16, and larger ones are no slower.
TABLE: dict[tuple[str, torch.dtype], BreakEven] = {
    ("v4", torch.float32): BreakEven(0.6, 8, _OVERHEAD),
    ("v3", torch.float32): BreakEven(0.55, 10, _OVERHEAD),
    ("v2", torch.float32): BreakEven(0.25, 8, _OVERHEAD),
    ("base", torch.float32): BreakEven(0.5, 8, _OVERHEAD),
    ("v4", torch.bfloat16): BreakEven(0.28, 16, _OVERHEAD),
    ("v3", torch.bfloat16): BreakEven(0.2, 16, _OVERHEAD),
    ("v2", torch.bfloat16): BreakEven(0.08, 16, _OVERHEAD),
    ("base", torch.bfloat16): BreakEven(0.2, 16, _OVERHEAD),
    ("v4 blocks of 16", torch.float32): BreakEven(0.7, 8, _OVERHEAD),
    ("v4 blocks of 8", torch.float32): BreakEven(0.55, 8, _OVERHEAD),
    ("v3 blocks of 16", torch.float32): BreakEven(0.65, 8, _OVERHEAD),
    ("v3 blocks of 8", torch.float32): BreakEven(0.5, 8, _OVERHEAD),
    ("v4_bf16 blocks of 16", torch.bfloat16): BreakEven(0.5, 8, _OVERHEAD),
    ("v4 blocks of 16", torch.bfloat16): BreakEven(0.4, 8, _OVERHEAD),
    ("v3 blocks of 16", torch.bfloat16): BreakEven(0.5, 8, _OVERHEAD),
    ("v4 blocks of 8", torch.bfloat16): BreakEven(0.3, 8, _OVERHEAD),
}

# Where dense products are faster than on AMD's: an Intel processor with AVX-512 multiplies float32 twice as fast as
# AMD's does in torch. What was not measured there is left out, so that it is never taken before it is calibrated.
_OTHER_VENDORS: dict[tuple[str, torch.dtype], BreakEven] = {
    ("v4", torch.float32): BreakEven(0.3, 8, _OVERHEAD),
    ("v4 blocks of 16", torch.float32): BreakEven(0.45, 8, _OVERHEAD),
}
_WITHOUT_MATRIX_UNIT = {
    **_OTHER_VENDORS,
    ("v4", torch.bfloat16): BreakEven(0.2, 16, _OVERHEAD),
    ("v4 blocks of 16", torch.bfloat16): BreakEven(0.5, 8, _OVERHEAD),
}

# Dense bfloat16 on a matrix unit is four to seven times as fast as float32: single connections pay above 91% only,
# blocks of 16 from 65% on, if there are many tokens. With few, the dense layer is busy with its weight, and both pay
# earlier. Measured with one thread on an Intel Xeon with AMX, but for lone tokens, which gain less with two.
_WITH_MATRIX_UNIT = {
    ("v4", torch.float32): BreakEven(0.46, 115, 1.7e7, 26, 3.7e6),
    ("v4", torch.bfloat16): BreakEven(0.092, 82, 1.2e8, 260, 4.7e7),
    ("v4 blocks of 16", torch.float32): BreakEven(0.5, 29, 1.4e7, 29, 3.8e6),
    ("v4 blocks of 8", torch.float32): BreakEven(0.32, 36, 1.4e7, 29, 3.8e6),
    ("v4_amx blocks of 16", torch.bfloat16): BreakEven(0.36, 108, 1.1e8, 280, 5e7),
    ("v4 blocks of 8", torch.bfloat16): BreakEven(0.063, 33, 1.05e8, 285, 4.7e7),
}


def _table() -> dict[tuple[str, torch.dtype], BreakEven]:
    """What the package knows of processors like this one."""
    if "v4" not in available():
        return TABLE
    if "v4_amx" in matrix_units():
        return _WITH_MATRIX_UNIT
    return TABLE if "AMD" in processor() else _WITHOUT_MATRIX_UNIT


def rule(dtype: torch.dtype, block: tuple[int, int] | None = None) -> BreakEven | None:
    """The rule in use: what `rarefy bench --calibrate` measured for this process, else the package's table.

    Args:
        dtype: of the activations.
        block: of the weight; None for single connections.

    Returns:
        None where there is no kernel for the dtype, or it was never measured on such a processor.

    Example:
        >>> rule(torch.float64) is None
        True
    """
    if instruction_set() == REFERENCE or dtype not in (torch.float32, torch.bfloat16):
        return None
    found = measured().get(key_of(dtype, block))
    ours = _table().get((kernels_in_use(dtype, block), dtype))
    if found is not None or ours is None:
        return found
    return ours.with_threads(torch.get_num_threads())


def relative_time(
    rows: int,
    columns: int,
    tokens: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
) -> float:
    """Expected time of a sparse layer's forward and backward pass, dense = 1; infinite where it is not known.

    (density / limit · (1 + tokens_offset / tokens) + overhead / (rows · columns · tokens))
    / (1 + dense_offset / tokens + dense_overhead / (rows · columns · tokens))

    Args:
        rows: rows of the weight (output features).
        columns: columns of the weight (input features).
        tokens: rows of the activations per step, ≥ 0.
        density: share of active connections, in [0, 1].
        dtype: of the activations (autocast's dtype under autocast).
        block: outputs and inputs of the blocks that are active as a whole; None for single connections.

    Example:
        >>> relative_time(768, 768, 2048, 0.1, torch.float64)
        inf
    """
    found = rule(dtype, block)
    if found is None or rows * columns * tokens == 0:
        return math.inf
    return found.relative_time(rows, columns, tokens, density)


def pays_off(
    rows: int,
    columns: int,
    tokens: int,
    density: float,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
) -> bool:
    """Whether compact storage is expected to be at least 3% faster than dense for this layer; see `relative_time`.

    Args:
        rows: outputs of the layer.
        columns: inputs of the layer.
        tokens: rows of activations in one forward pass.
        density: fraction of active connections, in [0, 1].
        dtype: of the activations.
        block: rows and columns of the pattern's blocks; None for single connections.

    Example:
        >>> pays_off(768, 768, 2048, 0.99)
        False
    """
    return relative_time(rows, columns, tokens, density, dtype, block) * MARGIN < 1


def break_even_sparsity(
    rows: int,
    columns: int,
    tokens: int,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] | None = None,
) -> float:
    """The sparsity above which compact storage pays for this layer; 1 where it never does.

    Args:
        rows: outputs of the layer.
        columns: inputs of the layer.
        tokens: rows of activations in one forward pass.
        dtype: of the activations.
        block: rows and columns of the pattern's blocks; None for single connections.

    Example:
        >>> break_even_sparsity(768, 768, 2048, torch.float64)
        1.0
    """
    fixed = relative_time(rows, columns, tokens, 0.0, dtype, block)
    if fixed * MARGIN >= 1:
        return 1.0
    slope = relative_time(rows, columns, tokens, 1.0, dtype, block) - fixed
    return max(0.0, 1 - (1 / MARGIN - fixed) / slope)
