"""The kernels for GPUs: on a GPU where there is one, else in Triton's interpreter, and compiled without being run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy
from block_cases import Case, check
from rarefy.errors import RarefyError
from rarefy.kernels import BlockTopology, block_linear, instruction_sets
from rarefy.kernels.gpu import block_calls, obstacle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    not instruction_sets.has_triton(), reason="triton is not installed: pip install triton"
)


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers of blocks take Triton's kernels."""
    if not instruction_sets.has_triton():
        pytest.skip("triton is not installed: pip install triton")
    if DEVICE == "cpu":
        monkeypatch.setenv("RAREFY_KERNELS", "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
    # Now: Triton decides on the import whether the kernels are to be interpreted.
    block_calls._kernels()


cases = st.builds(
    Case,
    down=st.sampled_from([0, 1, 3]),
    across=st.sampled_from([0, 1, 2, 5]),
    block=st.sampled_from([(8, 8), (16, 16), (16, 32), (32, 32), (64, 64), (24, 40), (80, 16), (16, 136)]),
    batch=st.sampled_from([(0,), (1,), (15,), (17,), (33,), (70,), (), (2, 0), (2, 3, 5)]),
    density=st.sampled_from([0.0, 0.3, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    strided=st.booleans(),
    seed=st.integers(0, 9),
    device=st.just(DEVICE),
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases)
def test_agrees_with_dense(triton: None, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("tokens", [15, 16, 31, 32, 63, 64, 65, 129])
def test_ragged_ends_of_tiles(triton: None, tokens: int) -> None:
    check(Case(2, 2, (32, 16), (tokens,), 0.7, device=DEVICE))


@pytest.mark.parametrize("block", [(16, 136), (136, 16), (24, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_that_tiles_do_not_fit(triton: None, block: tuple[int, int], dtype: torch.dtype) -> None:
    check(Case(2, 2, block, (17,), 0.8, dtype=dtype, device=DEVICE))


def test_tokens_are_shared_out_where_blocks_are_few(triton: None) -> None:
    assert block_calls._shares(tiles=2, steps=19) == 4
    check(Case(2, 1, (16, 16), (601,), 1.0, device=DEVICE))


@pytest.mark.parametrize(("tiles", "steps"), [(0, 0), (1, 0), (0, 9), (1, 1), (512, 99), (100_000, 99)])
def test_otherwise_they_are_not(tiles: int, steps: int) -> None:
    assert block_calls._shares(tiles, steps) == 1 or tiles == 0


def layer(dtype: torch.dtype = torch.float32) -> tuple[BlockTopology, dict[str, Tensor]]:
    torch.manual_seed(0)
    active = torch.rand(3, 4) < 0.5
    topology = BlockTopology.from_blocks(active.to(DEVICE), (16, 32))
    tensors = {
        "x": torch.randn(40, 128).to(dtype),
        "values": torch.randn(topology.values_shape),
        "bias": torch.randn(48),
    }
    return topology, {name: one.to(DEVICE) for name, one in tensors.items()}


def gradients(topology: BlockTopology, tensors: dict[str, Tensor], *names: str) -> list[Tensor]:
    leaves = {name: one.clone().requires_grad_(name in names) for name, one in tensors.items()}
    y = block_linear(leaves["x"], leaves["values"], leaves["bias"], topology)
    return list(torch.autograd.grad(y.float().square().sum(), [leaves[name] for name in names]))


def test_repeats_bit_for_bit(triton: None) -> None:
    topology, tensors = layer(torch.bfloat16)
    tensors["x"] = tensors["x"].repeat(20, 1)
    runs = [gradients(topology, tensors, "x", "values", "bias") for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
def test_computes_only_needed_gradients(triton: None, needed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    topology, tensors = layer()
    every = dict(zip(tensors, gradients(topology, tensors, *tensors), strict=True))
    calls: list[str] = []
    for name in ("_multiply", "_multiply_transposed"):
        monkeypatch.setattr(block_calls, name, noted(calls, getattr(block_calls, name)))
    [found] = gradients(topology, tensors, needed)
    assert torch.equal(found, every[needed])
    of = {"x": ["_multiply"], "values": ["_multiply_transposed"], "bias": []}
    assert calls == ["_multiply", *of[needed]]


def noted(calls: list[str], function: Any) -> Any:
    """The same function; each call is noted."""

    def called(*args: Any) -> Any:
        calls.append(function.__name__)
        return function(*args)

    return called


def test_values_in_half_precision(triton: None) -> None:
    topology, tensors = layer(torch.bfloat16)
    halves = {name: one.bfloat16() for name, one in tensors.items()}
    rounded = {name: one if name == "x" else one.float() for name, one in halves.items()}
    found = gradients(topology, halves, "values", "bias")
    assert [one.dtype for one in found] == [torch.bfloat16, torch.bfloat16]
    for mine, full in zip(found, gradients(topology, rounded, "values", "bias"), strict=True):
        # The gradient of y is rounded alike: both have the same y but for the bias, which is in float32 here and there.
        assert torch.equal(mine, full.bfloat16())


def test_a_nan_stays_in_its_block(triton: None) -> None:
    topology = BlockTopology.from_blocks(torch.eye(3, dtype=torch.bool, device=DEVICE), (8, 8))
    x = torch.ones(5, 24, device=DEVICE)
    x[-1, 4] = float("nan")
    y = block_linear(x, torch.ones(3, 8, 8, device=DEVICE), None, topology)
    wanted = torch.zeros(5, 24, dtype=torch.bool, device=DEVICE)
    wanted[-1, :8] = True
    assert torch.equal(y.isnan(), wanted)


def test_more_than_two_billion_elements(triton: None, tmp_path: Path) -> None:
    # Three tokens 2³⁰ elements apart, in memory that is touched nowhere else. Numbers of 32 bits would lead back to its
    # beginning, which is zero.
    size = 2**32 + 16
    if DEVICE == "cpu":
        memory = torch.from_file(str(tmp_path / "memory"), shared=True, size=size, dtype=torch.float16)
    else:
        memory = torch.zeros(size, dtype=torch.float16, device=DEVICE)
    x = memory.as_strided((3, 16), (2**30, 1), 2**31)
    x[2] = 1
    topology = BlockTopology.from_blocks(torch.ones(1, 1, dtype=torch.bool, device=DEVICE), (16, 16))
    ones = torch.ones(1, 16, 16, device=DEVICE, requires_grad=True)
    y = block_linear(x, ones, None, topology)
    assert y.tolist() == [[0.0] * 16, [0.0] * 16, [16.0] * 16]
    y.backward(torch.ones_like(y))
    assert torch.equal(ones.grad, torch.ones_like(ones))


# ---- which kernels are taken ----


def test_what_they_take(triton: None) -> None:
    taken = torch.zeros(1, device=DEVICE)
    assert all(block_calls.serves(taken, taken.to(dtype)) for dtype in (torch.float16, torch.bfloat16))
    assert not block_calls.serves(taken, taken.double())
    assert not block_calls.serves(taken, torch.zeros(1, device="meta"))


def test_they_are_left_alone_on_the_cpu_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (None, *instruction_sets.available()):
        monkeypatch.delenv("RAREFY_KERNELS", raising=False) if name is None else monkeypatch.setenv(
            "RAREFY_KERNELS", name
        )
        assert not block_calls.serves(torch.zeros(1))


def test_the_reference_is_taken_on_a_gpu_too_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAREFY_KERNELS", raising=False)
    assert instruction_sets.takes_triton(is_on_gpu=True)
    monkeypatch.setenv("RAREFY_KERNELS", instruction_sets.available()[-1])
    assert instruction_sets.takes_triton(is_on_gpu=True) == (len(instruction_sets.available()) > 1)
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    assert not instruction_sets.takes_triton(is_on_gpu=True)


@pytest.mark.parametrize("missing", ["interpreter", "triton"])
def test_they_are_refused_on_the_cpu_where_nothing_runs_them(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction_sets._chosen.cache_clear()
    monkeypatch.setenv("RAREFY_KERNELS", "triton")
    monkeypatch.setattr(instruction_sets, "has_triton", lambda: missing != "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0" if missing == "interpreter" else "1")
    with pytest.raises(
        RarefyError, match=r"^RAREFY_KERNELS: triton is for tests on the CPU and needs TRITON_INTERPRET=1"
    ):
        instruction_sets.instruction_set()


def test_everything_but_blocks_goes_the_reference_way(triton: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "triton")
    monkeypatch.setattr(instruction_sets, "_check_interpreter", lambda: None)
    assert instruction_sets.instruction_set() == "reference"
    assert instruction_sets.instruction_set_index() is None


GPU = torch.device("cuda", 0)


def pretend(monkeypatch: pytest.MonkeyPatch, installed: bool = True, capability: Any = (9, 0)) -> None:
    monkeypatch.setattr(block_calls, "has_triton", lambda: installed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def test_gpus_that_have_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for capability in ((8, 0), (8, 9), (10, 0)):
        pretend(monkeypatch, capability=capability)
        assert obstacle(GPU) == ""


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (
            {"installed": False},
            "triton, which brings the kernels for GPUs, is not installed: pip install triton",
        ),
        ({"capability": None}, "torch finds no GPU"),
        (
            {"capability": (7, 5)},
            "the kernels need a GPU of compute capability 8.0 or more, this one has 7.5",
        ),
    ],
)
def test_gpus_that_do_not_have_them(
    facts: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, **facts)
    assert obstacle(GPU) == reason


# ---- the precision of float32 ----


@pytest.fixture
def precision() -> Iterator[None]:
    found = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(found)


@pytest.mark.parametrize(("wanted", "used"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_float32_is_multiplied_as_torch_is_told_to(precision: None, wanted: str, used: str) -> None:
    torch.set_float32_matmul_precision(wanted)
    assert block_calls._options(torch.zeros(1))["PRECISION"] == used


def test_the_precision_of_the_newer_setting(precision: None) -> None:
    settings = torch.backends.cuda.matmul
    if not hasattr(settings, "fp32_precision"):
        pytest.skip("this torch has the older setting only")
    for wanted in ("tf32", "ieee"):
        settings.fp32_precision = wanted
        assert block_calls.float32_precision() == wanted


# ---- compiled for GPUs, which takes none ----

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from rarefy.kernels.gpu import block_kernels

def compile(kernel, capability, types, **constants):
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    # What is known of a call: addresses and sizes are multiples of 16.
    even = {(names.index(name),): [["tt.divisibility", 16]] for name in types}
    source = ASTSource(kernel, signature, fixed, even)
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_stages": 3})
    assert made.metadata.shared <= 65536, made.metadata.shared
    return made.asm["ptx"]

whole = dict.fromkeys(["tokens", "features", "blocks", "x_stride", "grad_stride", "steps"], "i32")
for capability in (80, 90):
    for dtype, side, precision in (("fp32", 32, "tf32"), ("bf16", 64, "ieee"), ("fp16", 64, "ieee")):
        both = {"TOKENS": side, "PRECISION": precision, "WIDENS": False}
        names = dict.fromkeys(["x", "weights", "bias", "y", "grad"], "*" + dtype)
        lists = dict.fromkeys(["starts", "indices", "order", "block_columns"], "*i32")
        types = {**names, **lists, **whole, "sums": "*fp32", "block_rows": "*i64"}
        def given(kernel):
            return {name: types[name] for name in kernel.arg_names if name in types}
        forward = block_kernels.multiply
        sizes = {"OUT": side, "IN": side, "OUT_STRIDE": side, "IN_STRIDE": 1, "TILE_OUT": side, "TILE_IN": side}
        made = [compile(forward, capability, given(forward), **both, **sizes)]
        backward = block_kernels.multiply_transposed
        sizes = {"HEIGHT": side, "WIDTH": side, "TILE_DOWN": side, "TILE_ACROSS": side}
        made.append(compile(backward, capability, given(backward), **both, **sizes))
        # instructions of matrix units
        assert all("mma" in one for one in made), (capability, dtype)
"""


@needs_triton
def test_they_compile_for_gpus_and_take_matrix_units(tmp_path: Path) -> None:
    settings = {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    environment = {**os.environ, **settings}
    environment.pop("RAREFY_KERNELS", None)
    made = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr


# ---- training ----


def trained(compute: str, dtype: torch.dtype | None) -> tuple[list[float], dict[str, Tensor], set[str]]:
    """Losses, the state at the end, and the storages of a few steps of RigL."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32)).to(DEVICE)
    sparsity = rarefy.RigL(
        0.6, update={"freq": 2}, pattern={"block": [16, 16]}, compute=compute, seed=1, drop_fraction=0.5
    )
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    losses = []
    for step in range(6):
        x = torch.randn(33, 64, generator=torch.Generator().manual_seed(step)).to(DEVICE)
        with torch.autocast(DEVICE, dtype or torch.bfloat16, enabled=dtype is not None):
            loss = (model(x) - x[:, :32]).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    forms = {row.storage for row in rarefy.summary(sparsity).rows}
    return losses, model.state_dict(), forms


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_rigl_trains_as_with_masked_storage(
    triton: None, dtype: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    masked, wanted, _ = trained("masked", dtype)
    calls: list[str] = []
    for name in ("forward", "backward"):
        monkeypatch.setattr(block_calls, name, noted(calls, getattr(block_calls, name)))
    losses, found, forms = trained("compact", dtype)
    # Every product of the two layers in six steps.
    assert sorted(calls) == ["backward"] * 12 + ["forward"] * 12 and forms == {"block"}
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype is None else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(losses, masked, **tolerance)
    assert losses[-1] < losses[0]
    if dtype is None:
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, **tolerance, msg=name)
