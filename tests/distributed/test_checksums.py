"""Checksums of pieces make the checksum of the whole."""

from __future__ import annotations

import zlib

from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.distributed.checksums import combined


@settings(max_examples=50, deadline=None)
@given(st.lists(st.binary(max_size=300), max_size=5))
def test_pieces_in_order(pieces):
    assert combined((zlib.crc32(piece), len(piece)) for piece in pieces) == zlib.crc32(b"".join(pieces))
