"""Which kernels a layer is computed with, by the name under which the cost rule knows them."""

from __future__ import annotations

import torch

from rarefy.kernels import takes_blocks
from rarefy.kernels.instruction_sets import REFERENCE, instruction_set, matrix_unit

_PAIRS = 16  # sizes that the instructions for pairs of bfloat16 take are multiples of this


def measured_block(block: tuple[int, int]) -> tuple[int, int]:
    """The blocks that stand for all of the same kernels in a measurement: the smallest, which gain least.

    Args:
        block: multiples of 8.

    Example:
        >>> measured_block((32, 64)), measured_block((32, 24))
        ((16, 16), (8, 8))
    """
    size = 8 if any(one % _PAIRS for one in block) else _PAIRS
    return size, size


def kernels_in_use(dtype: torch.dtype, block: tuple[int, int] | None = None) -> str:
    """The instruction set, and for layers of blocks what they are multiplied with.

    Args:
        dtype: of the activations.
        block: of the weight; None, and sizes that no block kernel takes, for single connections.

    Example:
        >>> kernels_in_use(torch.float32, (4, 4)) == kernels_in_use(torch.float32) == instruction_set()
        True
        >>> kernels_in_use(torch.float32, (32, 8)).removeprefix(instruction_set())
        ' blocks of 8'
    """
    name = instruction_set()
    if block is None or name == REFERENCE or not takes_blocks(block):
        return name
    size = measured_block(block)[0]
    unit = matrix_unit() if size == _PAIRS and dtype == torch.bfloat16 else ""
    return f"{unit or name} blocks of {size}"
