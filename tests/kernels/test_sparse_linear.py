"""Fuzz tests of the sparse linear operation against dense float64, for every instruction set."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from rarefy.errors import RarefyError
from rarefy.kernels import Panels, linear_gradients, sparse_linear

FUZZ = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}


@dataclass
class Case:
    rows: int
    columns: int
    batch: tuple[int, ...]
    density: float
    bias: bool = True
    dtype: torch.dtype = torch.float32
    threads: int = 2
    strided: bool = False
    seed: int = 0


cases = st.builds(
    Case,
    rows=st.sampled_from([0, 1, 3, 15, 16, 33, 70]),
    columns=st.sampled_from([0, 1, 5, 16, 31, 64, 97]),
    batch=st.sampled_from(
        [
            (0,),
            (1,),
            (2,),
            (3,),
            (7,),
            (9,),
            (17,),
            (33,),
            (50,),
            (67,),
            (130,),
            (270,),
            (),
            (2, 0),
            (2, 3, 5),
        ]
    ),
    density=st.sampled_from([0.0, 0.05, 0.4, 1.0]),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    threads=st.sampled_from([1, 2, 3, 5]),
    strided=st.booleans(),
    seed=st.integers(0, 9),
)
LARGE = [
    Case(800, 1100, (70,), 0.3, threads=3),  # several panels each way
    Case(3300, 300, (130,), 0.02, threads=2),  # several blocks of rows in the forward pass
    Case(300, 1900, (67,), 0.05, threads=5, dtype=torch.bfloat16),  # ... and in the backward pass
    Case(300, 500, (330,), 0.2, threads=1),  # longer tiles in the backward pass too, and the end of one
    Case(200, 1900, (600,), 0.1, threads=2, dtype=torch.bfloat16),  # ... in several blocks of rows
    Case(500, 300, (370,), 0.05, threads=1),  # tiles of middling length in the backward pass
    Case(200, 1900, (700,), 0.05, threads=2),  # ... in several blocks of rows
    Case(90, 150, (3100,), 0.3, threads=3),  # tiles that whoever is free takes
    Case(5200, 400, (1030,), 0.1, threads=2),  # rows that are sorted by length, two blocks of them
    Case(1700, 1700, (5,), 0.01),
    Case(700, 900, (1,), 0.1),
    Case(64, 70000, (3,), 0.001),  # columns that do not fit 16 bits
    Case(1030, 40, (8200,), 0.02),  # results of 32 MB, in large pages: y
    Case(40, 1030, (8200,), 0.02),  # ... dL/dx
]


def mask_of(case: Case) -> Tensor:
    mask = torch.rand(case.rows, case.columns) < case.density
    if case.rows > 2:
        mask[1], mask[2] = False, True
    return mask


def activations(case: Case, size: int) -> Tensor:
    wide = torch.randn(*case.batch, size * (2 if case.strided else 1)).to(case.dtype)
    return wide[..., ::2] if case.strided else wide


def close(found: Tensor, wanted: Tensor, bound: Tensor, dtype: torch.dtype) -> None:
    """Errors are measured against the sum of the magnitudes that were added."""
    assert found.shape == wanted.shape
    assert ((found.double() - wanted).abs() <= TOLERANCE[dtype] * bound + 1e-30).all()


def check(case: Case) -> None:
    torch.manual_seed(case.seed)
    torch.set_num_threads(case.threads)
    panels = Panels.from_mask(mask_of(case))
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    x, grad = activations(case, case.columns).requires_grad_(), activations(case, case.rows)
    values = torch.randn(panels.nonzeros, dtype=wide, requires_grad=True)
    bias = torch.randn(case.rows, dtype=wide, requires_grad=True) if case.bias else None
    y = sparse_linear(x, values, bias, panels)
    y.backward(grad)
    assert y.dtype == case.dtype and y.shape == (*case.batch, case.rows)

    tokens = torch.Size(case.batch).numel()
    weight, offset = panels.dense(values.detach()).double(), torch.zeros(case.rows, dtype=torch.float64)
    offset = offset if bias is None else bias.detach().double()
    flat_x, flat_grad = (
        x.detach().double().reshape(tokens, case.columns),
        grad.double().reshape(tokens, case.rows),
    )
    flat_y = y.detach().reshape(tokens, case.rows)
    close(flat_y, flat_x @ weight.t() + offset, flat_x.abs() @ weight.abs().t() + offset.abs(), case.dtype)
    assert x.grad is not None and values.grad is not None
    close(
        x.grad.reshape(tokens, case.columns), flat_grad @ weight, flat_grad.abs() @ weight.abs(), case.dtype
    )
    close(
        values.grad,
        panels.gather(flat_grad.t() @ flat_x),
        panels.gather(flat_grad.abs().t() @ flat_x.abs()),
        wide,
    )
    if bias is not None and bias.grad is not None:
        close(bias.grad, flat_grad.sum(0), flat_grad.abs().sum(0), wide)


@FUZZ
@given(case=cases)
def test_agrees_with_dense(isa: str, case: Case) -> None:
    check(case)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: f"{case.rows}x{case.columns}x{case.batch[0]}")
def test_several_panels_and_row_blocks(isa: str, case: Case) -> None:
    check(case)


def layer(
    rows: int = 40, columns: int = 50, dtype: torch.dtype = torch.float32
) -> tuple[Panels, Tensor, Tensor]:
    torch.manual_seed(0)
    panels = Panels.from_mask(torch.rand(rows, columns) < 0.3)
    values = torch.randn(panels.nonzeros, dtype=dtype, requires_grad=True)
    return panels, values, torch.randn(rows, dtype=dtype, requires_grad=True)


# With many tokens whoever is free takes the next ones, in the order that each sum has.
@pytest.mark.parametrize("tokens", [700, 3100])
@pytest.mark.parametrize("threads", [1, 2, 3, 5])
def test_repeats_bit_for_bit(isa: str, threads: int, tokens: int) -> None:
    torch.set_num_threads(threads)
    panels, values, bias = layer(120, 200)
    x = torch.randn(tokens, 200, requires_grad=True)
    losses = (sparse_linear(x, values, bias, panels).square().sum() for _ in range(4))
    runs = [torch.autograd.grad(loss, [x, values, bias]) for loss in losses]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_many_tokens_give_the_bits_of_few(isa: str, threads: int) -> None:
    """Rows are sorted by length where many tokens make up for it; each one's sum stays what it was."""
    torch.set_num_threads(threads)
    mask = torch.rand(5200, 400) < 0.1
    mask[7] = True
    panels = Panels.from_mask(mask)
    values, bias, x = torch.randn(panels.nonzeros), torch.randn(5200), torch.randn(1030, 400)
    many = sparse_linear(x, values, bias, panels)
    few = [sparse_linear(part, values, bias, panels) for part in (x[:64], x[-70:])]
    exact = {"rtol": 1e-4, "atol": 1e-4} if isa == "reference" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(many[:64], few[0], **exact)
    torch.testing.assert_close(many[-70:], few[1], **exact)


def test_gradient_check(isa: str) -> None:
    panels, values, bias = layer(6, 9, torch.float64)
    x = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, v, b: sparse_linear(x, v, b, panels), (x, values, bias))


@pytest.mark.parametrize("needed", ["x", "values", "bias"])
def test_computes_only_needed_gradients(isa: str, needed: str) -> None:
    panels, values, bias = layer()
    tensors = {"x": torch.randn(8, 50), "values": values.detach(), "bias": bias.detach()}
    every = {name: t.clone().requires_grad_() for name, t in tensors.items()}
    sparse_linear(every["x"], every["values"], every["bias"], panels).sin().sum().backward()
    tensors[needed].requires_grad_()
    sparse_linear(tensors["x"], tensors["values"], tensors["bias"], panels).sin().sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [needed]
    torch.testing.assert_close(tensors[needed].grad, every[needed].grad)


def test_probe_receives_the_dense_gradient(isa: str) -> None:
    panels, values, _ = layer()
    probe, x = torch.zeros(40, 50, requires_grad=True), torch.randn(2, 3, 50)
    grad = torch.randn(2, 3, 40)
    sparse_linear(x, values, None, panels, probe).backward(grad)
    torch.testing.assert_close(probe.grad, grad.flatten(0, 1).t() @ x.flatten(0, 1))


@pytest.mark.parametrize("strided", [False, True])
def test_a_large_dense_gradient(isa: str, strided: bool, monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(
        linear_gradients,
        "_ONEDNN",
        lambda *a, _onednn=linear_gradients._ONEDNN: (calls.append(1), _onednn(*a))[1],
    )
    panels = Panels.from_mask(torch.rand(300, 250) < 0.1)
    values = torch.randn(panels.nonzeros, requires_grad=True)
    # Overlapping windows are a layout that oneDNN refuses.
    x = torch.randn(160 * 90 + 160).unfold(0, 250, 90) if strided else torch.randn(4, 40, 250)
    probe, grad = torch.zeros(300, 250, requires_grad=True), torch.randn(*x.shape[:-1], 300)
    sparse_linear(x, values, None, panels, probe).backward(grad)
    wanted = grad.double().flatten(0, -2).t() @ x.double().flatten(0, -2)
    torch.testing.assert_close(probe.grad, wanted.float(), rtol=1e-4, atol=1e-4)
    assert linear_gradients._LARGE < 300 * 250 * 158
    assert bool(calls) == (isa == "v4" and not strided)


def test_compiles_without_graph_breaks(isa: str) -> None:
    panels, values, bias = layer()
    x = torch.randn(5, 50, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, v, b: sparse_linear(x, v, b, panels), fullgraph=True, backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(x, values, bias).square().sum(), [x, values, bias])
    wanted = torch.autograd.grad(sparse_linear(x, values, bias, panels).square().sum(), [x, values, bias])
    torch.testing.assert_close(found, wanted)


def test_activation_checkpointing(isa: str) -> None:
    panels, values, bias = layer()
    x = torch.randn(5, 50, requires_grad=True)
    again = checkpoint(sparse_linear, x, values, bias, panels, use_reentrant=False)
    assert isinstance(again, Tensor)
    found = torch.autograd.grad(again.square().sum(), [x, values])
    wanted = torch.autograd.grad(sparse_linear(x, values, bias, panels).square().sum(), [x, values])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_functional_gradient(isa: str) -> None:
    panels, values, bias = layer()
    x = torch.randn(5, 50)
    found = torch.func.grad(lambda v: sparse_linear(x, v, bias.detach(), panels).square().sum())(
        values.detach()
    )
    (wanted,) = torch.autograd.grad(sparse_linear(x, values, bias, panels).square().sum(), [values])
    torch.testing.assert_close(found, wanted)


# Of copies that torch 2.14 makes of the arguments.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_operation_contract(isa: str) -> None:
    panels, values, bias = layer()
    x = torch.randn(5, 50, requires_grad=True)
    torch.library.opcheck(
        torch.ops.rarefy.sparse_linear, (x, values, bias, None, *panels.tensors, panels.sizes)
    )


@pytest.mark.parametrize("tokens", [1, 6, 30])
def test_nan_and_infinity_stay_where_they_are(isa: str, tokens: int) -> None:
    panels = Panels.from_mask(torch.eye(20, dtype=torch.bool))
    x = torch.ones(tokens, 20, dtype=torch.bfloat16)
    x[-1, 4], x[-1, 6] = float("nan"), float("inf")
    y = sparse_linear(x, torch.ones(20), None, panels)
    if isa == "reference":
        return  # multiplies zeros too, and NaN · 0 is NaN
    assert torch.equal(y.isnan(), x.isnan()) and torch.equal(y.isinf(), x.isinf())


@pytest.mark.parametrize("batch", [(), (1,), (5,), (70,), (2, 3)])
def test_inference_gives_the_same_bits(isa: str, batch: tuple[int, ...]) -> None:
    panels, values, bias = layer()
    x = torch.randn(*batch, 50)
    trained = sparse_linear(x, values, bias, panels)
    with torch.inference_mode():
        assert torch.equal(sparse_linear(x, values, bias, panels), trained)


class Recorder(TorchDispatchMode):
    """The names of the operations that pass by."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_modes_see_the_operation_without_gradients(isa: str) -> None:
    panels, values, bias = layer()
    with torch.no_grad(), Recorder() as recorder:
        sparse_linear(torch.randn(3, 50), values, bias, panels)
    assert "rarefy.sparse_linear.default" in recorder.names


def test_transforms_without_gradients(isa: str) -> None:
    panels, values, bias = layer()
    x = torch.randn(3, 50)

    def loss(scale: Tensor) -> Tensor:
        with torch.no_grad():
            y = sparse_linear(scale * x, values, bias, panels)
        return (scale * y).sum()

    found = torch.func.grad(loss)(torch.tensor(1.0))
    torch.testing.assert_close(found, sparse_linear(x, values, bias, panels).sum().detach())


def test_wrong_width_is_refused() -> None:
    panels, values, _ = layer()
    with pytest.raises(RarefyError, match="last dimension must be 50"):
        sparse_linear(torch.randn(5, 51), values, None, panels)


def test_mixed_types_are_refused() -> None:
    panels, values, _ = layer()
    with pytest.raises(RarefyError, match=r"float64 is not allowed with torch\.float32 values"):
        sparse_linear(torch.randn(5, 50, dtype=torch.float64), values, None, panels)
