"""Freed memory stays with the process where that was asked for, and nowhere else."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import pytest

from rarefy import allocator
from rarefy.allocator import keep_freed_memory
from rarefy.errors import RarefyError

SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")
# Five blocks at once are more than what glibc keeps by itself, twice the largest block that was freed.
PROGRAM = """
import ctypes, resource, sys
from rarefy.allocator import keep_freed_memory

print(keep_freed_memory())
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
size = 20 << 20
for _ in range(4):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [libc.malloc(ctypes.c_size_t(size)) for _ in range(5)]
    for block in blocks:
        ctypes.memset(block, 1, size)
    for block in blocks:
        libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def is_glibc() -> bool:
    return sys.platform == "linux" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


def faults(**environment: str) -> tuple[bool, int]:
    """Whether a process keeps its memory, and how often it had to fetch a page for a hundred megabytes."""
    inherited = {
        name: value for name, value in os.environ.items() if name not in (*SETTINGS, "GLIBC_TUNABLES")
    }
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=inherited | environment, capture_output=True, text=True, check=True)
    keeps, count = done.stdout.split()
    return keeps == "True", int(count)


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without settings, in which nothing is set for the process of the tests."""
    for name in (*SETTINGS, "GLIBC_TUNABLES", "RAREFY_MALLOC"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.skipif(not is_glibc(), reason="glibc alone gives memory back this way")
def test_memory_is_fetched_once_where_it_is_kept_and_every_time_where_it_is_not() -> None:
    keeps, once = faults(RAREFY_MALLOC="1")
    gives_back, again = faults(RAREFY_MALLOC="0")
    assert keeps
    assert not gives_back
    assert again > 4 * once
    assert again > 20


def test_both_settings_are_made(undecided: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int]] = []

    def mallopt(number: int, value: int) -> int:
        made.append((number, value))
        return 1

    undecided.setattr(allocator, "_mallopt", lambda: mallopt)
    assert keep_freed_memory()
    assert made == [(-3, 32 << 20), (-1, 512 << 20)]


def test_a_refusal_of_glibc_is_told(undecided: pytest.MonkeyPatch) -> None:
    undecided.setattr(allocator, "_mallopt", lambda: lambda number, value: 0)
    assert not keep_freed_memory()


def test_another_library_is_left_alone(undecided: pytest.MonkeyPatch) -> None:
    undecided.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_memory()


def test_a_library_that_was_loaded_before_glibc_is_left_alone(undecided: pytest.MonkeyPatch) -> None:
    addresses = iter((1, 2))
    undecided.setattr(allocator, "_address", lambda function: next(addresses))
    assert not keep_freed_memory()


@pytest.mark.parametrize("name", SETTINGS)
def test_what_the_user_has_set_stays(undecided: pytest.MonkeyPatch, name: str) -> None:
    undecided.setattr(allocator, "_mallopt", lambda: pytest.fail("it was changed"))
    undecided.setenv(name, "1048576")
    assert not keep_freed_memory()


def test_tunables_count_where_they_are_about_malloc(undecided: pytest.MonkeyPatch) -> None:
    undecided.setattr(allocator, "_mallopt", lambda: lambda number, value: 1)
    undecided.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=on")
    assert keep_freed_memory()
    undecided.setenv("GLIBC_TUNABLES", "glibc.cpu.x86_ibt=on:glibc.malloc.mmap_max=0")
    assert not keep_freed_memory()


def test_the_variable_is_0_or_1(undecided: pytest.MonkeyPatch) -> None:
    undecided.setenv("RAREFY_MALLOC", "off")
    with pytest.raises(RarefyError, match=r"RAREFY_MALLOC: 'off' is not allowed; give 0 or 1, or unset it"):
        keep_freed_memory()
