"""The checksum of bytes that lie in pieces, from the checksums of the pieces."""

from __future__ import annotations

from collections.abc import Iterable

# That of CRC-32 with its bits turned around, as zlib computes it.
_POLYNOMIAL = 0xEDB88320
_BITS = 32


def combined(pieces: Iterable[tuple[int, int]]) -> int:
    """The CRC-32 of pieces one after the other.

    CRC-32 is linear: zeros that are appended multiply it by a matrix over GF(2), and the checksum of what comes after
    is added to that.

    Args:
        pieces: CRC-32 and number of bytes of each.

    Example:
        >>> import zlib
        >>> combined([(zlib.crc32(b"mas"), 3), (zlib.crc32(b"k"), 1), (0, 0)]) == zlib.crc32(b"mask")
        True
    """
    whole = 0
    for checksum, length in pieces:
        whole = _times(_zeros(length), whole) ^ checksum
    return whole


def _times(matrix: list[int], vector: int) -> int:
    """A matrix of columns times a vector of bits."""
    product = 0
    for bit in range(_BITS):
        if vector >> bit & 1:
            product ^= matrix[bit]
    return product


def _zeros(length: int) -> list[int]:
    """The matrix of so many bytes of zeros, by repeated squaring."""
    # One bit of zeros: each bit moves down by one, and the lowest one falls out and is divided by the polynomial.
    power = [_POLYNOMIAL] + [1 << bit for bit in range(_BITS - 1)]
    # Squared three times, one bit of zeros becomes a byte.
    for _ in range(3):
        power = [_times(power, column) for column in power]
    result = [1 << bit for bit in range(_BITS)]
    while length:
        if length & 1:
            result = [_times(power, column) for column in result]
        power = [_times(power, column) for column in power]
        length >>= 1
    return result
