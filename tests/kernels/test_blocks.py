"""Fuzz tests of the linear operation of blocks against dense float64, for every instruction set."""

from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from block_cases import Case, check
from rarefy.errors import RarefyError
from rarefy.kernels import BlockTopology, block_linear, block_native
from rarefy.kernels.instruction_sets import matrix_units

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BLOCKS = [
    (8, 8),
    (16, 16),
    (16, 32),
    (32, 16),
    (32, 32),
    (64, 64),
    (8, 16),
    (16, 8),
    (24, 40),
    (48, 8),
    (4, 12),
]


cases = st.builds(
    Case,
    down=st.sampled_from([0, 1, 3, 7]),
    across=st.sampled_from([0, 1, 2, 9]),
    block=st.sampled_from(BLOCKS),
    batch=st.sampled_from(
        [(0,), (1,), (2,), (3,), (7,), (11,), (13,), (25,), (49,), (97,), (150,), (), (2, 0), (2, 3, 5)]
    ),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    threads=st.sampled_from([1, 2, 3, 5]),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
LARGE = [  # enough work for several threads, and more tokens than a chunk
    Case(9, 11, (32, 32), (437,), 0.3, threads=3),
    Case(21, 5, (16, 16), (1000,), 0.4, threads=2),
    Case(5, 21, (16, 32), (333,), 0.5, threads=5, dtype=torch.bfloat16),
    Case(4, 6, (64, 64), (401,), 0.6, threads=4, dtype=torch.bfloat16),
    Case(40, 30, (8, 24), (261,), 0.2, threads=3),
    Case(70, 70, (32, 32), (5,), 0.1, threads=2),
    Case(70, 70, (32, 32), (1,), 0.3, threads=2),
    Case(33, 2, (32, 32), (8200,), 0.1, threads=2),  # results of 32 MB, in large pages: y
    Case(2, 33, (32, 32), (8200,), 0.1, threads=2),  # ... dL/dx
    Case(64, 130, (32, 32), (70,), 1.0, threads=2),  # ... dL/dW, and the sums of a thread
]


@FUZZ
@given(case=cases)
def test_agrees_with_dense(isa: str, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.rows}x{case.columns}x{case.batch[0]}")
def test_several_threads_and_chunks(isa: str, case: Case) -> None:
    check(case)


@pytest.fixture(params=["v4_bf16", "v4_amx"])
def unit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in matrix_units():
        pytest.skip(f"this machine does not have {request.param}")
    monkeypatch.setenv("RAREFY_KERNELS", request.param)
    return request.param


pairs = st.builds(
    Case,
    down=st.sampled_from([0, 1, 3, 7]),
    across=st.sampled_from([0, 1, 2, 9]),
    block=st.sampled_from([(16, 16), (16, 32), (32, 16), (32, 32), (64, 64), (48, 32), (32, 80), (48, 16)]),
    batch=st.sampled_from(
        [(0,), (1,), (2,), (15,), (17,), (31,), (33,), (49,), (65,), (97,), (230,), (2, 3, 5)]
    ),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    bias=st.booleans(),
    dtype=st.just(torch.bfloat16),
    threads=st.sampled_from([1, 2, 3, 5]),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)


@FUZZ
@given(case=pairs)
def test_matrix_units_agree_with_dense(unit: str, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.rows}x{case.columns}x{case.batch[0]}")
def test_matrix_units_with_several_threads_and_chunks(unit: str, case: Case) -> None:
    check(replace(case, dtype=torch.bfloat16))


@pytest.mark.parametrize("tokens", range(1, 70))
def test_matrix_units_and_every_ragged_end(unit: str, tokens: int) -> None:
    check(Case(2, 2, (32, 16), (tokens,), 0.7, threads=1, dtype=torch.bfloat16))


def test_matrix_units_take_a_matrix_without_rows_and_columns(unit: str) -> None:
    check(Case(0, 0, (32, 32), (40,), 1.0, dtype=torch.bfloat16))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_matrix_units_repeat_bit_for_bit(unit: str, threads: int) -> None:
    torch.set_num_threads(threads)
    topology = BlockTopology.from_blocks(torch.rand(6, 7) < 0.5, (32, 32))
    values = torch.randn(topology.values_shape, requires_grad=True)
    x = torch.randn(700, 224, dtype=torch.bfloat16, requires_grad=True)
    losses = (block_linear(x, values, None, topology).square().sum() for _ in range(3))
    runs = [torch.autograd.grad(loss, [x, values]) for loss in losses]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
def test_matrix_units_compute_only_needed_gradients(unit: str, needed: str) -> None:
    topology = BlockTopology.from_blocks(torch.rand(3, 4) < 0.5, (16, 32))
    tensors = {"values": torch.randn(topology.values_shape), "bias": torch.randn(48)}
    tensors["x"] = torch.randn(40, 128, dtype=torch.bfloat16)
    every = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    block_linear(every["x"], every["values"], every["bias"], topology).float().sum().backward()
    tensors[needed].requires_grad_()
    block_linear(tensors["x"], tensors["values"], tensors["bias"], topology).float().sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    assert torch.equal(tensors[needed].grad, every[needed].grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_matrix_unit_does_not_take_goes_to_the_instruction_set(
    unit: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = (24, 8) if dtype == torch.bfloat16 else (32, 32)
    topology = BlockTopology.from_blocks(torch.rand(3, 4) < 0.5, block)
    x = torch.randn(40, topology.columns).to(dtype)
    values = torch.randn(topology.values_shape)
    found = block_linear(x, values, None, topology)
    monkeypatch.setenv("RAREFY_KERNELS", "v4")
    assert torch.equal(found, block_linear(x, values, None, topology))


@pytest.mark.parametrize("tokens", range(1, 50))
def test_every_ragged_end(isa: str, tokens: int) -> None:
    check(Case(2, 2, (32, 16), (tokens,), 0.7, threads=1))


def test_a_matrix_without_rows_and_columns(isa: str) -> None:
    check(Case(0, 0, (32, 32), (40,), 1.0))


def layer(dtype: torch.dtype = torch.float32) -> tuple[BlockTopology, Tensor, Tensor]:
    torch.manual_seed(0)
    topology = BlockTopology.from_blocks(torch.rand(3, 5) < 0.4, (16, 8))
    values = torch.randn(topology.values_shape, dtype=dtype, requires_grad=True)
    return topology, values, torch.randn(48, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_repeats_bit_for_bit(isa: str, threads: int) -> None:
    torch.set_num_threads(threads)
    topology = BlockTopology.from_blocks(torch.rand(6, 7) < 0.5, (32, 32))
    values = torch.randn(topology.values_shape, requires_grad=True)
    bias = torch.randn(192, requires_grad=True)
    x = torch.randn(700, 224, requires_grad=True)
    losses = (block_linear(x, values, bias, topology).square().sum() for _ in range(4))
    runs = [torch.autograd.grad(loss, [x, values, bias]) for loss in losses]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_gradient_check(isa: str) -> None:
    topology = BlockTopology.from_blocks(torch.tensor([[True, False], [True, True]]), (3, 2))
    values = torch.randn(topology.values_shape, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 4, dtype=torch.float64, requires_grad=True)
    inputs = (x, values, bias)
    assert torch.autograd.gradcheck(lambda x, v, b: block_linear(x, v, b, topology), inputs)
    assert torch.autograd.gradgradcheck(lambda x, v, b: block_linear(x, v, b, topology), inputs)


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
def test_computes_only_needed_gradients(isa: str, needed: str) -> None:
    topology, values, bias = layer()
    tensors = {"x": torch.randn(8, 40), "values": values.detach(), "bias": bias.detach()}
    every = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    block_linear(every["x"], every["values"], every["bias"], topology).sin().sum().backward()
    tensors[needed].requires_grad_()
    block_linear(tensors["x"], tensors["values"], tensors["bias"], topology).sin().sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    torch.testing.assert_close(tensors[needed].grad, every[needed].grad)


def test_probe_receives_the_dense_gradient(isa: str) -> None:
    topology, values, _ = layer()
    probe = torch.zeros(48, 40, requires_grad=True)
    x = torch.randn(2, 3, 40)
    grad = torch.randn(2, 3, 48)
    block_linear(x, values, None, topology, probe).backward(grad)
    torch.testing.assert_close(probe.grad, grad.flatten(0, 1).t() @ x.flatten(0, 1))


def test_compiles_without_graph_breaks(isa: str) -> None:
    topology, values, bias = layer()
    x = torch.randn(5, 40, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, v, b: block_linear(x, v, b, topology), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(x, values, bias).square().sum(), [x, values, bias])
    wanted = torch.autograd.grad(block_linear(x, values, bias, topology).square().sum(), [x, values, bias])
    torch.testing.assert_close(found, wanted)


def test_activation_checkpointing(isa: str) -> None:
    topology, values, bias = layer()
    x = torch.randn(5, 40, requires_grad=True)
    again = checkpoint(block_linear, x, values, bias, topology, use_reentrant=False)
    assert isinstance(again, Tensor)
    found = torch.autograd.grad(again.square().sum(), [x, values])
    wanted = torch.autograd.grad(block_linear(x, values, bias, topology).square().sum(), [x, values])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_functional_gradient(isa: str) -> None:
    topology, values, bias = layer()
    x = torch.randn(5, 40)
    found = torch.func.grad(lambda v: block_linear(x, v, bias.detach(), topology).square().sum())(
        values.detach()
    )
    (wanted,) = torch.autograd.grad(block_linear(x, values, bias, topology).square().sum(), [values])
    torch.testing.assert_close(found, wanted)


# Of copies that torch 2.14 makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operation_contract(isa: str) -> None:
    topology, values, bias = layer()
    x = torch.randn(5, 40, requires_grad=True)
    torch.library.opcheck(
        torch.ops.rarefy.block_linear, (x, values, bias, None, *topology.tensors, topology.sizes)
    )


@pytest.mark.parametrize("tokens", [1, 6, 30])
def test_nan_and_infinity_stay_in_their_blocks(isa: str, tokens: int) -> None:
    topology = BlockTopology.from_blocks(torch.eye(3, dtype=torch.bool), (8, 8))
    x = torch.ones(tokens, 24, dtype=torch.bfloat16)
    x[-1, 4] = float("nan")
    x[-1, 12] = float("inf")
    y = block_linear(x, torch.ones(3, 8, 8), None, topology)
    if isa == "reference":
        return  # multiplies zeros too, and NaN · 0 is NaN
    wanted = torch.zeros(tokens, 3, dtype=torch.bool)
    wanted[-1] = torch.tensor([True, False, False])
    assert torch.equal(y.isnan(), wanted.repeat_interleave(8, 1))
    assert torch.equal(y.isinf(), wanted.roll(1, 1).repeat_interleave(8, 1))


def test_compiled_kernels_take_multiples_of_eight_on_the_cpu(isa: str) -> None:
    compiled = isa != "reference"
    assert block_native.serves([32, 32, 8, 32], torch.ones(1)) == compiled
    assert not block_native.serves([32, 32, 4, 32], torch.ones(1))
    assert not block_native.serves([32, 32, 8, 32], torch.ones(1, dtype=torch.float16))


def test_wrong_width_is_refused() -> None:
    topology, values, _ = layer()
    with pytest.raises(RarefyError, match="last dimension must be 40"):
        block_linear(torch.randn(5, 41), values, None, topology)


def test_mixed_types_are_refused() -> None:
    topology, values, _ = layer()
    with pytest.raises(RarefyError, match=r"float64 is not allowed with torch\.float32 values"):
        block_linear(torch.randn(5, 40, dtype=torch.float64), values, None, topology)


@pytest.mark.parametrize("name", ["values", "bias"])
def test_wrong_shapes_are_refused(name: str) -> None:
    topology, values, bias = layer()
    tensors = {"values": values, "bias": bias}
    tensors[name] = tensors[name][1:]
    with pytest.raises(RarefyError, match=f"^{name}: shape .* is not allowed; give "):
        block_linear(torch.randn(5, 40), tensors["values"], tensors["bias"], topology)


@pytest.mark.parametrize("name", ["values", "bias"])
def test_other_devices_are_refused(name: str) -> None:
    topology, values, bias = layer()
    tensors = {"values": values, "bias": bias}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RarefyError, match=f"{name}: meta is not allowed with x on cpu; move one of them"):
        block_linear(torch.randn(5, 40), tensors["values"], tensors["bias"], topology)


def test_the_flops_are_those_of_the_active_blocks() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    topology, values, _ = layer()
    x = torch.randn(5, 40, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        block_linear(x, values, None, topology).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 5 * topology.nonzeros
