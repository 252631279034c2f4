"""Calls into the Triton kernels of blocks; what they rely on is said here."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.blocks import block_rows
from rarefy.kernels.instruction_sets import has_triton, takes_triton

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_CAPABILITY = (8, 0)  # of the first GPUs that multiply bfloat16
_NARROWEST = 16  # what matrix units take
# Sides of tiles by the bytes of an element: with the tiles of three steps on their way, within 64 KB of shared memory.
_WIDEST = {2: 64, 4: 32}
# Few blocks leave most of a GPU idle while the tokens of each are added up one after the other: they are then shared
# out, by sizes alone, so that the bits do not depend on the GPU.
_PROGRAMS = 512
_SHORTEST_SHARE = 4


def obstacle(device: torch.device) -> str:
    """Why these kernels do not run on a GPU; empty if they do.

    Args:
        device: of type cuda.

    Example:
        >>> isinstance(obstacle(torch.device("cuda")), str)
        True
    """
    if not has_triton():
        return "triton, which brings the kernels for GPUs, is not installed: pip install triton"
    if not torch.cuda.is_available():
        return "torch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if capability < _CAPABILITY:
        found, needed = (".".join(map(str, one)) for one in (capability, _CAPABILITY))
        return f"the kernels need a GPU of compute capability {needed} or more, this one has {found}"
    return ""


def serves(*tensors: Tensor) -> bool:
    """Whether the kernels take these activations and values: float32, bfloat16 or float16 on a GPU.

    Under `RAREFY_KERNELS=triton` they take them on the CPU, in Triton's interpreter.

    Example:
        >>> serves(torch.zeros(1, dtype=torch.float64))
        False
    """
    first = tensors[0]
    fits = all(one.dtype in _DTYPES and one.device == first.device for one in tensors)
    if not fits or not takes_triton(first.is_cuda):
        return False
    return first.is_cpu or (first.is_cuda and _runs_on(first.get_device()))


def forward(
    x: Tensor, values: Tensor, bias: Tensor | None, starts: Tensor, indices: Tensor, sizes: list[int]
) -> Tensor:
    """X · Wᵀ + bias.

    Args:
        x: [tokens, columns].
        values: [blocks, height, width], rounded to the dtype of x.
        bias: [rows] or None.
        starts: by block row.
        indices: by block row.
        sizes: those of the `BlockTopology`.
    """
    rows, _, height, width = sizes
    weights = values.to(x.dtype).contiguous()
    y = x.new_empty(x.shape[0], rows)
    return _multiply(x, weights, bias, y, (starts, indices, None), (height, width), (width, 1))


def backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    lines: tuple[Tensor, Tensor],
    transpose: tuple[Tensor, Tensor, Tensor],
    sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, values and bias (empty where not needed), the last two in float32.

    Args:
        grad: [tokens, rows], of the dtype of x.
        x: [tokens, columns].
        values: [blocks, height, width], rounded to the dtype of x.
        lines: starts and indices by block row.
        transpose: starts and indices by block column, and the order.
        sizes: those of the `BlockTopology`.
        needs: which of the three are wanted.
    """
    _, columns, height, width = sizes
    grad_x = x.new_empty(0)
    grad_values = x.new_empty(0, dtype=torch.float32)
    grad_bias = grad_values
    if needs[0]:
        weights = values.to(x.dtype).contiguous()
        grad_x = x.new_empty(x.shape[0], columns)
        _multiply(grad, weights, None, grad_x, transpose, (width, height), (1, width))
    if needs[1]:
        grad_values = _multiply_transposed(grad, x, *lines, (height, width))
    if needs[2]:
        grad_bias = grad.sum(0, dtype=torch.float32)
    return grad_x, grad_values, grad_bias


def _multiply(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    y: Tensor,
    lines: tuple[Tensor, Tensor, Tensor | None],
    block: tuple[int, int],
    strides: tuple[int, int],
) -> Tensor:
    """Fills y; block and strides are those of the matrix that multiplies, whose lines these are."""
    tokens, features = y.shape
    if not y.numel():
        return y
    x = _by_rows(x)
    starts, indices, order = lines
    out, into = (_side(size, x) for size in block)
    run = _side(tokens, x)
    programs = _parts(tokens, run) * (features // block[0]) * _parts(block[0], out)
    with torch.cuda.device_of(x):
        _kernels().multiply[(programs,)](
            x, weights, bias, y, starts, indices, order, tokens, features, x.stride(0),
            OUT=block[0], IN=block[1], OUT_STRIDE=strides[0], IN_STRIDE=strides[1],
            TOKENS=run, TILE_OUT=out, TILE_IN=into, **_options(x),
        )  # fmt: skip
    return y


def _multiply_transposed(
    grad: Tensor, x: Tensor, starts: Tensor, indices: Tensor, block: tuple[int, int]
) -> Tensor:
    tokens = x.shape[0]
    blocks = indices.numel()
    down, across = (_side(size, x) for size in block)
    run = _side(tokens, x)
    tiles = blocks * _parts(block[0], down) * _parts(block[1], across)
    steps = _parts(tokens, run)
    shares = _shares(tiles, steps)
    sums = x.new_empty(shares, blocks, *block, dtype=torch.float32)
    if not sums.numel():
        return sums[0]
    grad = _by_rows(grad)
    x = _by_rows(x)
    with torch.cuda.device_of(x):
        _kernels().multiply_transposed[(shares * tiles,)](
            grad, x, sums, block_rows(starts, blocks), indices,
            tokens, blocks, grad.stride(0), x.stride(0), _parts(steps, shares),
            HEIGHT=block[0], WIDTH=block[1],
            TOKENS=run, TILE_DOWN=down, TILE_ACROSS=across, **_options(x),
        )  # fmt: skip
    return sums[0] if shares == 1 else sums.sum(0)


def _shares(tiles: int, steps: int) -> int:
    """In how many parts the tokens are added up."""
    return max(1, min(_PROGRAMS // max(tiles, 1), steps // _SHORTEST_SHARE))


def _by_rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous; they may be any distance apart."""
    return x if x.stride(1) == 1 else x.contiguous()


def _side(size: int, x: Tensor) -> int:
    """The side of the tiles that a length is cut in: a power of two."""
    widest = _WIDEST[x.element_size()]
    return min(widest, max(_NARROWEST, 1 << (size - 1).bit_length()))


def _parts(size: int, side: int) -> int:
    return -(-size // side)


def _options(x: Tensor) -> dict[str, Any]:
    """How products are computed: as precisely as torch's own on this GPU."""
    # The interpreter multiplies with NumPy, which has no bfloat16.
    return {"PRECISION": float32_precision(), "WIDENS": x.is_cpu, "num_stages": 3}


def float32_precision() -> str:
    """`tf32` where torch may multiply float32 in that format on GPUs, else `ieee`.

    Example:
        >>> float32_precision()
        'ieee'
    """
    settings = torch.backends.cuda.matmul
    # The older of the two attributes may not be read where the newer one was set.
    precision = getattr(settings, "fp32_precision", None)
    if precision is None:
        return "tf32" if settings.allow_tf32 else "ieee"
    return "tf32" if precision == "tf32" else "ieee"


def _kernels() -> Any:
    return importlib.import_module("rarefy.kernels.gpu.block_kernels")


@functools.cache
def _runs_on(index: int) -> bool:
    return not obstacle(torch.device("cuda", index))
