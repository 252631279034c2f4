"""Triton kernels for weights of blocks; importing this file imports Triton, so only `block_calls` does.

A block is cut in tiles whose sides are powers of two, as Triton wants them: what sticks out is loaded as zero and not
stored. Every sum has one place where it is added up, in one order, so that the same call gives the same bits.
"""

# ruff: noqa: N803, D417 — constants stand in capitals, and what a name says itself is not repeated
# What Triton compiles is not what its stubs say.
# pyright: reportMissingImports=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    x, weights, bias, y, starts, indices, order, tokens, features, x_stride,
    OUT: tl.constexpr, IN: tl.constexpr, OUT_STRIDE: tl.constexpr, IN_STRIDE: tl.constexpr,
    TOKENS: tl.constexpr, TILE_OUT: tl.constexpr, TILE_IN: tl.constexpr,
    PRECISION: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """One tile of y = x · Mᵀ + bias, where M is the weight, or its transpose for the gradient of x.

    A line is a row of blocks of M, of height OUT; its blocks have width IN.

    Args:
        x: [tokens, ...], rows x_stride apart.
        weights: [blocks, height, width] of the weight itself.
        bias: [features] or None.
        y: [tokens, features], contiguous.
        starts: [lines + 1], the first block of each.
        indices: [blocks], where along the line each is.
        order: [blocks], the place of each among `weights`; None where they stand in this order.
    """
    tiles_of_block = (OUT + TILE_OUT - 1) // TILE_OUT
    tiles_across: tl.constexpr = (IN + TILE_IN - 1) // TILE_IN
    tiles = features // OUT * tiles_of_block
    # Neighbours share their tokens, which then come from the cache.
    tile = tl.program_id(0) % tiles
    line = tile // tiles_of_block
    out = tile % tiles_of_block * TILE_OUT + tl.arange(0, TILE_OUT)
    # In 64 bits: activations may have more than 2³¹ elements.
    token = (tl.program_id(0) // tiles).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    sums = tl.full([TOKENS, TILE_OUT], 0.0, tl.float32)
    first = tl.load(starts + line) * tiles_across
    last = tl.load(starts + line + 1) * tiles_across
    for step in range(first, last):
        block = step // tiles_across
        inside = step % tiles_across * TILE_IN + tl.arange(0, TILE_IN)
        column = tl.load(indices + block) * IN + inside
        if order is not None:
            block = tl.load(order + block)
        values = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token[:, None] < tokens) & (inside[None, :] < IN),
            other=0.0,
        )
        place = block.to(tl.int64) * (OUT * IN) + out[None, :] * OUT_STRIDE + inside[:, None] * IN_STRIDE
        is_inside = (out[None, :] < OUT) & (inside[:, None] < IN)
        part = tl.load(weights + place, mask=is_inside, other=0.0)
        if WIDENS:
            values = values.to(tl.float32)
            part = part.to(tl.float32)
        sums = tl.dot(values, part, sums, input_precision=PRECISION)
    feature = line * OUT + out
    if bias is not None:
        sums += tl.load(bias + feature, mask=out < OUT, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y + token[:, None] * features + feature[None, :],
        sums.to(y.dtype.element_ty),
        mask=(token[:, None] < tokens) & (out[None, :] < OUT),
    )


@triton.jit
def multiply_transposed(
    grad, x, sums, block_rows, block_columns, tokens, blocks, grad_stride, x_stride, steps,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr,
    TOKENS: tl.constexpr, TILE_DOWN: tl.constexpr, TILE_ACROSS: tl.constexpr,
    PRECISION: tl.constexpr, WIDENS: tl.constexpr,
):  # fmt: skip
    """One tile of one active block of gradᵀ · x, over one share of the tokens.

    Args:
        grad: [tokens, rows], rows grad_stride apart.
        x: [tokens, columns], rows x_stride apart.
        sums: float32 [shares, blocks, height, width], contiguous.
        block_rows, block_columns: [blocks].
        steps: tiles of TOKENS tokens in a share.
    """
    tiles_down = (HEIGHT + TILE_DOWN - 1) // TILE_DOWN
    tiles_across = (WIDTH + TILE_ACROSS - 1) // TILE_ACROSS
    tile = tl.program_id(0) % (tiles_down * tiles_across)
    block = tl.program_id(0) // (tiles_down * tiles_across) % blocks
    share = tl.program_id(0) // (tiles_down * tiles_across) // blocks
    down = tile // tiles_across * TILE_DOWN + tl.arange(0, TILE_DOWN)
    across = tile % tiles_across * TILE_ACROSS + tl.arange(0, TILE_ACROSS)
    row = tl.load(block_rows + block) * HEIGHT + down
    column = tl.load(block_columns + block) * WIDTH + across
    total = tl.full([TILE_DOWN, TILE_ACROSS], 0.0, tl.float32)
    for step in range(0, steps):
        token = (share.to(tl.int64) * steps + step) * TOKENS + tl.arange(0, TOKENS)
        grads = tl.load(
            grad + token[None, :] * grad_stride + row[:, None],
            mask=(token[None, :] < tokens) & (down[:, None] < HEIGHT),
            other=0.0,
        )
        values = tl.load(
            x + token[:, None] * x_stride + column[None, :],
            mask=(token[:, None] < tokens) & (across[None, :] < WIDTH),
            other=0.0,
        )
        if WIDENS:
            grads = grads.to(tl.float32)
            values = values.to(tl.float32)
        total = tl.dot(grads, values, total, input_precision=PRECISION)
    place = (share.to(tl.int64) * blocks + block) * (HEIGHT * WIDTH)
    tl.store(
        sums + place + down[:, None] * WIDTH + across[None, :],
        total,
        mask=(down[:, None] < HEIGHT) & (across[None, :] < WIDTH),
    )
