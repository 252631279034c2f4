"""Memory that is freed in every step of a training, and that the system need not have back in between."""

from __future__ import annotations

import ctypes
import os
from typing import Any

from rarefy.errors import RarefyError

VARIABLE = "RAREFY_MALLOC"
# glibc's numbers for mallopt, from its malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_KEPT = 512 << 20  # bytes at the end of the heap
_FROM_HEAP = 32 << 20  # the largest that glibc takes
# Whoever set one of these has decided already; the last holds settings of many parts of glibc.
_DECIDED = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
_TUNABLES = "GLIBC_TUNABLES"


def keep_freed_memory() -> bool:
    """Lets this process keep up to 512 MB of freed memory, and take blocks of up to 32 MB from it.

    By itself glibc gives the outputs and scratch memory of a step back to the system, depending on how the heap came to
    lie, and every page is fetched and zeroed again in the next step. It holds for the whole process until its end, so
    programs call it, and libraries do not.

    Returns:
        Whether memory is kept now: not with another allocator's library than glibc's, with `RAREFY_MALLOC=0`, or where
        the environment says what glibc is to do (`MALLOC_TRIM_THRESHOLD_` and the like, `GLIBC_TUNABLES`).

    Raises:
        RarefyError: RAREFY_MALLOC is neither 0 nor 1.

    Example:
        >>> keep_freed_memory() in (True, False)
        True
    """
    wanted = os.environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise RarefyError(f"{VARIABLE}: {wanted!r} is not allowed; give 0 or 1, or unset it")
    if wanted == "0" or _is_decided():
        return False
    mallopt = _mallopt()
    if mallopt is None:
        return False
    # Either setting ends glibc's own adjustment, so that the two belong together.
    return bool(mallopt(_MMAP_THRESHOLD, _FROM_HEAP) and mallopt(_TRIM_THRESHOLD, _KEPT))


def _is_decided() -> bool:
    chosen = any(name in os.environ for name in _DECIDED)
    return chosen or "glibc.malloc." in os.environ.get(_TUNABLES, "")


def _mallopt():
    """The function of glibc; None on another system, and where glibc does not allocate."""
    try:
        process = ctypes.CDLL(None)
        # Others name a function the same whose numbers mean other things.
        _ = process.gnu_get_libc_version
        # A library that was loaded before glibc allocates in its place, and leaves it its mallopt.
        is_glibcs = _address(process.malloc) == _address(ctypes.CDLL("libc.so.6").malloc)
        return process.mallopt if is_glibcs else None
    except (AttributeError, OSError, TypeError):
        return None


def _address(function: Any) -> int | None:
    return ctypes.cast(function, ctypes.c_void_p).value
