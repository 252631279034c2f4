"""The matrix unit AMX in every thread and process, none of which may be without the system's permission to use it."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from block_cases import Case, check
from rarefy.kernels import BlockTopology, block_linear
from rarefy.kernels.instruction_sets import matrix_units

pytestmark = pytest.mark.skipif("v4_amx" not in matrix_units(), reason="this machine does not have AMX")

# A first instruction without the permission would end the process.
PRODUCT = """
import os, sys, threading
os.environ["RAREFY_KERNELS"] = "v4_amx"
import torch
torch.set_num_threads(1)
found = []

def product(_=0):
    from rarefy.kernels import BlockTopology, block_linear
    torch.manual_seed(0)
    topology = BlockTopology.from_blocks(torch.rand(3, 4) < 0.6, (32, 32))
    x, values = torch.randn(70, 128).bfloat16(), torch.randn(topology.values_shape)
    return block_linear(x, values, None, topology).float()

def other_thread(started, may_go):
    started.set()
    may_go.wait()
    found.append(product())

class Products(torch.utils.data.Dataset):
    def __len__(self):
        return 3
    def __getitem__(self, number):
        return product()
"""


def run(script: str) -> None:
    """Runs a script that ends with an assertion, in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", PRODUCT + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_a_thread_that_is_older_than_the_permission() -> None:
    run("""
started, may_go = threading.Event(), threading.Event()
thread = threading.Thread(target=other_thread, args=(started, may_go))
thread.start()
started.wait()
wanted = product()  # asks for it
may_go.set()
thread.join()
assert torch.equal(found[0], wanted)
""")


def test_a_thread_that_is_younger_than_the_permission() -> None:
    run("""
wanted = product()
thread = threading.Thread(target=lambda: found.append(product()))
thread.start()
thread.join()
assert torch.equal(found[0], wanted)
""")


@pytest.mark.parametrize("before", ["product()", "None"])
def test_a_forked_process_before_and_after_the_permission(before: str) -> None:
    run(f"""
{before}
child = os.fork()
if child == 0:
    os._exit(0 if product().isfinite().all() else 7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 0
""")


def test_workers_of_a_data_loader() -> None:
    run("""
wanted = product()
loader = torch.utils.data.DataLoader(Products(), num_workers=2, multiprocessing_context="fork")
assert all(torch.equal(one[0], wanted) for one in loader)
""")


def registers_in_use() -> Callable[[], int]:
    """A function that reads which registers of this thread are not in their first state (XINUSE)."""
    code = bytes.fromhex("b901000000 0f01d0 c3")  # mov ecx, 1; xgetbv; ret
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(code)
    anchor = ctypes.c_char.from_buffer(page)
    call = ctypes.CFUNCTYPE(ctypes.c_uint32)(ctypes.addressof(anchor))
    return lambda: call() if not page.closed and anchor is not None else 0


@pytest.mark.parametrize("tokens", [5, 32, 70, 700])
def test_tiles_are_released(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the system would save and restore 8 KB of them at every switch of threads."""
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
    tile_registers = 3 << 17
    read = registers_in_use()
    topology = BlockTopology.from_blocks(torch.rand(3, 4) < 0.6, (32, 32))
    x = torch.randn(tokens, 128, dtype=torch.bfloat16, requires_grad=True)
    values = torch.randn(topology.values_shape, requires_grad=True)
    y = block_linear(x, values, None, topology)
    assert not read() & tile_registers
    # autograd would run the backward pass in a thread of its own
    parts = (*topology.tensors, topology.sizes, [True, True, True])
    torch.ops.rarefy.block_linear_backward(y.detach(), x.detach(), values.detach(), *parts)
    assert not read() & tile_registers


# Strips of 16 outputs are written in pairs, maybe of two blocks, and gradients added up to four strips at once.
@pytest.mark.parametrize("block", [(16, 16), (16, 32), (32, 16), (48, 16), (16, 48), (48, 48), (80, 32)])
@pytest.mark.parametrize("down", [1, 2, 3, 5])
@pytest.mark.parametrize("tokens", [9, 64, 301])
def test_pairs_of_strips(
    block: tuple[int, int], down: int, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
    for density in (0.3, 0.8):
        check(Case(down, 5, block, (tokens,), density, threads=2, dtype=torch.bfloat16))
    check(Case(5, down, block, (tokens,), 0.5, threads=1, dtype=torch.bfloat16))


def test_more_block_rows_than_are_multiplied_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Panels of dL/dy are read in groups of 512 KB."""
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
    check(Case(70, 3, (32, 32), (300,), 0.2, threads=1, dtype=torch.bfloat16))
    check(Case(67, 3, (48, 16), (300,), 0.2, threads=2, dtype=torch.bfloat16))


@pytest.mark.parametrize("case", [
    # x and dL/dy are copied tile after tile, with a ragged end, and dL/dx is written past the caches.
    Case(32, 132, (32, 32), (501,), 0.2, threads=1, dtype=torch.bfloat16),
    Case(64, 264, (16, 16), (501,), 0.2, threads=1, dtype=torch.bfloat16),
    # So is y, by threads of which one begins in the middle of a line of the cache.
    Case(704, 16, (16, 16), (190,), 0.25, threads=3, dtype=torch.bfloat16, seed=1),
    # So is dL/dx, of which each thread has some columns.
    Case(4, 1400, (16, 16), (95,), 0.5, threads=3, dtype=torch.bfloat16),
    # The longest turns.
    Case(64, 64, (32, 32), (150,), 0.45, threads=1, dtype=torch.bfloat16),
])  # fmt: skip
def test_more_than_the_caches_hold(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
    check(case)


def test_what_is_not_a_number_stays_in_its_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
    topology = BlockTopology.from_blocks(torch.eye(3, dtype=torch.bool), (32, 32))
    x = torch.ones(45, 96, dtype=torch.bfloat16)
    x[40, 4] = float("nan")
    x[44, 40] = float("inf")
    y = block_linear(x, torch.ones(3, 32, 32), None, topology)
    assert y.isnan().nonzero().tolist() == [[40, column] for column in range(32)]
    assert y.isinf().nonzero().tolist() == [[44, column] for column in range(32, 64)]
