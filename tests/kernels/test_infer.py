"""Inference: the shortest way to the kernels, and where it is not taken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

from rarefy.errors import RarefyError
from rarefy.kernels import Panels, infer, infer_gradients, instruction_set, sparse_linear
from rarefy.nn import SparseLinear

from .test_sparse_linear import Recorder


def layer(rows: int, columns: int, density: float, dtype: torch.dtype = torch.float32) -> SparseLinear:
    """Rows of all lengths: full and empty ones among them."""
    torch.manual_seed(0)
    mask = torch.rand(rows, columns) < density * 2 * torch.rand(rows, 1)
    mask[::7], mask[3::7] = True, False
    return SparseLinear(mask, dtype=dtype)


def shortest(sparse: SparseLinear, x: Tensor) -> Tensor | None:
    return infer(x, sparse.weight.entries, sparse.bias, panels_of(sparse).layout)


def panels_of(sparse: SparseLinear) -> Panels:
    index = sparse.weight.topology.index
    assert isinstance(index, Panels)
    return index


@pytest.mark.parametrize("threads", [1, 2, 3, 5])
@pytest.mark.parametrize("density", [0.0, 0.02, 0.1, 0.6, 1.0])
@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (130, 700), (300, 150), (9, 1200), (60, 500)])
def test_a_lone_token(isa: str, shape: tuple[int, int], density: float, threads: int) -> None:
    sparse = layer(*shape, density)
    x, before = torch.randn(shape[1]), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            y = sparse(x)
    finally:
        torch.set_num_threads(before)
    exact = sparse.weight.dense().double() @ x.double() + sparse.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [100, 130, 200, 260, 320, 384, 385, 548, 1600])
def test_a_lone_token_in_wide_panels(isa: str, columns: int) -> None:
    torch.manual_seed(columns)
    sparse = SparseLinear(torch.rand(90, columns) < 0.02)
    x = torch.randn(columns)
    with torch.inference_mode():
        y = sparse(x)
    exact = sparse.weight.dense().double() @ x.double() + sparse.bias.double()
    torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_that_torch_prunes(name: str) -> None:
    sparse, x = layer(30, 50, 0.3), torch.randn(2, 50)
    prune.random_unstructured(sparse, name, 0.5)
    with torch.no_grad():
        y = sparse(x)
    assert torch.equal(y, sparse(x))


def test_values_of_other_rows_do_not_leak(isa: str) -> None:
    sparse = SparseLinear(torch.eye(40, dtype=torch.bool), bias=False)
    x = torch.ones(40)
    x[7] = torch.inf
    with torch.inference_mode():
        assert sparse(x).isfinite().sum() == (39 if instruction_set() != "reference" else 0)


@pytest.mark.parametrize("batch", [(), (0,), (1,), (1, 1), (2, 3), (70,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bits_of_training(isa: str, batch: tuple[int, ...], dtype: torch.dtype) -> None:
    sparse = layer(30, 50, 0.3)
    x = torch.randn(*batch, 50, dtype=dtype)
    with torch.no_grad():
        y = shortest(sparse, x)
    assert (y is None) == (isa == "reference")
    trained = sparse_linear(x, sparse.weight.entries, sparse.bias, panels_of(sparse))
    assert y is None or (torch.equal(y, trained) and y.shape == trained.shape)


def test_an_input_that_is_not_contiguous(isa: str) -> None:
    sparse, x = layer(30, 50, 0.3), torch.randn(50, 4)
    with torch.no_grad():
        assert torch.equal(sparse(x.t()), sparse(x.t().contiguous()))


class Marked(Tensor):
    """A subclass, whose operations may be watched."""


ODD: dict[str, Callable[[SparseLinear], Tensor]] = {
    "a number": lambda _: torch.tensor(1.0),
    "the wrong width": lambda _: torch.ones(2, 49),
    "float64": lambda _: torch.ones(2, 50, dtype=torch.float64),
    "a subclass": lambda _: torch.ones(2, 50).as_subclass(Marked),
    "another device": lambda _: torch.ones(2, 50, device="meta"),
}


@pytest.mark.parametrize("name", ODD)
def test_left_to_the_general_way(name: str) -> None:
    sparse = layer(30, 50, 0.3)
    with torch.no_grad():
        assert shortest(sparse, ODD[name](sparse)) is None


def test_other_parameters_are_left_to_the_general_way() -> None:
    x = torch.ones(2, 50)
    strided = layer(30, 50, 0.3)
    strided.weight._cell.values = strided.weight.entries.repeat_interleave(2)[::2]
    halved = layer(30, 50, 0.3)
    halved.bias = nn.Parameter(torch.zeros(60)[::2])
    for sparse in (strided, halved, layer(30, 50, 0.3, torch.float64)):
        with torch.no_grad():
            assert shortest(sparse, x.to(sparse.weight.dtype)) is None


def test_gradients_and_modes_are_left_to_the_general_way() -> None:
    sparse, x = layer(30, 50, 0.3), torch.ones(2, 50)
    assert shortest(sparse, x) is None
    with torch.no_grad(), Recorder():
        assert shortest(sparse, x) is None


def test_a_layer_under_autocast() -> None:
    sparse, x = layer(30, 50, 0.3), torch.randn(3, 50)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = sparse(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), sparse(x).detach(), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:.torch.jit")  # torch warns of it
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_sees_the_operation(isa: str) -> None:
    sparse, x = layer(30, 50, 0.3), torch.randn(3, 50)
    with torch.no_grad():
        traced: Any = torch.jit.trace(sparse, torch.ones(3, 50), check_trace=False)
        assert torch.equal(traced(x), sparse(x))


def test_a_lazy_sign(isa: str) -> None:
    sparse, z = layer(3, 1, 1.0), torch.randn(1, 1, dtype=torch.cfloat)
    with torch.no_grad():
        assert torch.equal(sparse(z.conj().imag), sparse(z.conj().imag.clone()))


@pytest.mark.parametrize("name", ["bias"])
@pytest.mark.parametrize("with_gradients", [True, False])
def test_parameters_of_another_size_are_refused(name: str, with_gradients: bool) -> None:
    sparse, x = layer(30, 50, 0.3), torch.ones(2, 50)
    with torch.set_grad_enabled(with_gradients), pytest.raises(RarefyError, match=name + r": shape \(3,\)"):
        torch.func.functional_call(sparse, {name: torch.ones(3)}, (x,))


def test_a_bias_on_another_device() -> None:
    sparse, x = layer(30, 50, 0.3), torch.ones(2, 50)
    with torch.no_grad(), pytest.raises(RarefyError, match="bias: meta is not allowed with x on cpu"):
        torch.func.functional_call(sparse, {"bias": torch.ones(30, device="meta")}, (x,))


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_no_columns(isa: str) -> None:
    sparse = SparseLinear(torch.ones(3, 0, dtype=torch.bool))
    with torch.no_grad():
        assert torch.equal(sparse(torch.ones(2, 0)), sparse.bias.expand(2, 3))


# ---- gradients ----

ALL = [True, True, True]


def shortest_gradients(sparse: SparseLinear, x: Tensor, grad: Tensor) -> tuple[Tensor, ...] | None:
    with torch.no_grad():
        return infer_gradients(grad, x, sparse.weight.entries, panels_of(sparse), ALL)


@pytest.mark.parametrize("needs", [ALL, [True, False, False], [False, True, False], [False, False, True]])
@pytest.mark.parametrize("batch", [(), (0,), (1,), (2, 3), (70,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_bits_of_the_operation(
    isa: str, batch: tuple[int, ...], dtype: torch.dtype, needs: list[bool]
) -> None:
    sparse = layer(30, 50, 0.3)
    panels = panels_of(sparse)
    parts = (
        torch.randn(*batch, 30, dtype=dtype),
        torch.randn(*batch, 50, dtype=dtype),
        sparse.weight.entries,
    )
    with torch.no_grad():
        found = infer_gradients(*parts, panels, needs)
        wanted = panels.gradients(*parts, needs)
    assert (found is None) == (isa == "reference")
    for one, other, needed in zip(found or wanted, wanted, needs, strict=True):
        assert not needed or (torch.equal(one, other) and one.shape == other.shape)


def test_gradients_of_what_is_not_contiguous(isa: str) -> None:
    sparse, x, grad = layer(30, 50, 0.3), torch.randn(50, 4).t(), torch.randn(30, 4).t()
    found = shortest_gradients(sparse, x, grad)
    wanted = shortest_gradients(sparse, x.contiguous(), grad.contiguous())
    assert (found is None) == (isa == "reference")
    assert found is None or all(map(torch.equal, found, wanted or ()))


def test_gradients_that_are_left_to_the_general_way() -> None:
    sparse, x, grad = layer(30, 50, 0.3), torch.ones(2, 50), torch.ones(2, 30)
    assert infer_gradients(grad, x.requires_grad_(), sparse.weight.entries, panels_of(sparse), ALL) is None
    x = x.detach()
    with Recorder():
        assert shortest_gradients(sparse, x, grad) is None
    assert shortest_gradients(sparse, x.double(), grad.double()) is None
    assert shortest_gradients(sparse, x.bfloat16(), grad) is None
    assert shortest_gradients(sparse, x, grad.as_subclass(Marked)) is None
    assert shortest_gradients(sparse, x, torch._efficientzerotensor((2, 30))) is None
    for other in (torch.ones(1, 50), torch.ones(3, 50), torch.ones(2, 49), torch.ones(50)):
        assert shortest_gradients(sparse, other, grad) is None
    without_columns = Panels.from_mask(torch.ones(30, 0, dtype=torch.bool))
    assert infer_gradients(grad, torch.ones(2, 0), torch.ones(0), without_columns, ALL) is None
