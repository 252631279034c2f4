"""Heights and widths of blocks on a command line."""

from __future__ import annotations


def block_size(text: str) -> tuple[int, int]:
    """Height and width: of `32x8`, 32 and 8; of `32`, 32 and 32."""
    height, _, width = text.partition("x")
    return int(height), int(width or height)
