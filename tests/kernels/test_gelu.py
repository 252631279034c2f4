"""GELU with the tangent: the kernel's values and gradients, and everything that torch has to compute instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from rarefy.kernels import exact_gelu, native, tanh_gelu
from rarefy.kernels.dense import calls as kernels
from rarefy.kernels.dense import gelu
from rarefy.kernels.instruction_sets import instruction_set, matrix_units

COMPILED = pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")
SIZES = (1, 3, 4, 7, 8, 9, 15, 16, 17, 31, 100, 4096, 100_003)


def of_torch(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def exact(x: Tensor) -> Tensor:
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.fixture
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes tensors of few entries too."""
    monkeypatch.setattr(gelu, "_LEAST", 0)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel was called for."""
    made: list[str] = []
    original = kernels.gelu

    def counted(name: str, x: Tensor, grad: Tensor | None) -> Tensor:
        made.append("forward" if grad is None else "backward")
        return original(name, x, grad)

    monkeypatch.setattr(kernels, "gelu", counted)
    return made


def large(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return 3 * torch.randn(*(shape or (130, 130)))


@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(isa: str, any_size: None, size: int) -> None:
    x = torch.linspace(-13, 13, size, requires_grad=True)
    weight = torch.cos(torch.arange(size))
    y = tanh_gelu(x)
    y.backward(weight)
    double = x.detach().double().requires_grad_()
    exact(double).backward(weight.double())
    assert x.grad is not None and double.grad is not None
    assert ((y - exact(double)).abs() <= 3e-7 * double.abs() + 1e-38).all()
    # torch's own derivative, which the reference path is, is further from the exact one
    bound = 2e-6 if isa == "reference" else 5e-7
    assert ((x.grad - double.grad).abs() <= bound).all()


def test_of_numbers_at_the_end(isa: str, any_size: None) -> None:
    x = torch.tensor([0.0, -0.0, math.inf, 1e20, -1e20, -30.0, 1e-40, math.nan, -math.inf])
    assert torch.equal(tanh_gelu(x)[:7], torch.tensor([0.0, -0.0, math.inf, 1e20, -0.0, -0.0, 5e-41]))
    assert tanh_gelu(x)[7:].isnan().all()
    assert torch.equal(torch.signbit(tanh_gelu(x)[:6]), torch.signbit(x[:6]))


@COMPILED
def test_derivatives_of_numbers_at_the_end(any_size: None) -> None:
    x = torch.tensor([math.inf, 1e20, -1e20, -math.inf, math.nan], requires_grad=True)
    tanh_gelu(x).sum().backward()
    assert x.grad is not None
    assert x.grad[:4].tolist() == [1, 1, 0, 0] and x.grad[4].isnan()


def test_the_bits_depend_neither_on_threads_nor_on_the_place(isa: str, any_size: None) -> None:
    if isa == "reference":
        pytest.skip("torch's")
    x, grad = large(300_007), torch.ones(300_007)
    found = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        found.append((kernels.gelu("gelu_tanh", x, None), kernels.gelu("gelu_tanh", x, grad)))
    assert all(torch.equal(one, found[0][0]) and torch.equal(other, found[0][1]) for one, other in found)
    shifted = x[1:1000].clone()
    assert torch.equal(kernels.gelu("gelu_tanh", shifted, None), found[0][0][1:1000])
    assert torch.equal(kernels.gelu("gelu_tanh", x[:3].clone(), None), found[0][0][:3])


@COMPILED
@pytest.mark.parametrize("gradient", ["whole", "expanded", "transposed"])
def test_the_kernel_is_taken_both_ways(calls: list[str], gradient: str) -> None:
    x = large().requires_grad_()
    given = {
        "whole": torch.ones(130, 130),
        "expanded": torch.ones(1, 1).expand(130, 130),
        "transposed": large().t(),
    }[gradient]
    [found] = torch.autograd.grad(tanh_gelu(x), x, given)
    assert calls == ["forward", "backward"]
    [wanted] = torch.autograd.grad(of_torch(x), x, given)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)


@COMPILED
def test_without_gradients_nothing_is_recorded(calls: list[str]) -> None:
    with torch.inference_mode():
        tanh_gelu(large())
    with torch.no_grad():
        assert not tanh_gelu(large().requires_grad_()).requires_grad
    assert not tanh_gelu(large()).requires_grad
    assert calls == ["forward"] * 3


class Named(Tensor):
    """A subclass, which may mean anything."""


def with_a_mode(x: Tensor) -> Tensor:
    with FlopCounterMode(display=False):
        return tanh_gelu(x)


def with_a_tangent(x: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return tanh_gelu(x)


def traced(x: Tensor) -> Tensor:
    return torch.jit.trace(tanh_gelu, x, check_trace=False)(x)  # pyright: ignore[reportCallIssue]


OTHERS: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]] = {
    "few entries": (large(100), tanh_gelu),
    "other strides": (large().t(), tanh_gelu),
    "float16": (large().half(), tanh_gelu),
    "float64": (large().double(), tanh_gelu),
    "a subclass": (large().as_subclass(Named), tanh_gelu),
    "a transform": (large(), torch.func.vmap(tanh_gelu)),
    "a mode": (large(), with_a_mode),
    "a tangent": (large(), with_a_tangent),
    "a trace": (large(), traced),
    "meta": (large().to("meta"), tanh_gelu),
}


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.parametrize("name", OTHERS)
def test_torch_computes_what_the_kernel_cannot(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    x, function = OTHERS[name]
    monkeypatch.setattr(kernels, "gelu", lambda *_: pytest.fail("the kernel was called"))
    y = function(x)
    assert y.shape == x.shape and y.dtype == x.dtype
    assert y.is_meta or torch.equal(y, of_torch(x))


@COMPILED
def test_an_extension_of_before_has_no_such_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "has", lambda operation: operation != "gelu_tanh")
    assert torch.equal(tanh_gelu(large()), of_torch(large()))


def test_second_derivatives() -> None:
    x = large(200, 100).div(3).requires_grad_()
    found: list[Any] = []
    for function in (tanh_gelu, of_torch):
        [first] = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.sum(), x)[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_gradients_of_a_batch_at_once() -> None:
    x = large(200, 100).requires_grad_()
    batch = torch.stack([torch.ones(200, 100), torch.full((200, 100), 2.0)])
    [found] = torch.autograd.grad(tanh_gelu(x), x, batch, is_grads_batched=True)
    [wanted] = torch.autograd.grad(of_torch(x), x, batch, is_grads_batched=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_saved_tensors_that_were_put_elsewhere() -> None:
    x = large(200, 100).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.t().contiguous(), lambda t: t.t()):
        y = tanh_gelu(x)
    [found] = torch.autograd.grad(y.sum(), x)
    [wanted] = torch.autograd.grad(of_torch(x).sum(), x)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_within_a_checkpoint() -> None:
    x = large(200, 100).requires_grad_()
    y: Any = checkpoint(tanh_gelu, x, use_reentrant=False)
    [found] = torch.autograd.grad(y.sum(), x)
    assert torch.equal(found, torch.autograd.grad(tanh_gelu(x).sum(), x)[0])


def test_under_autocast_the_dtype_stays() -> None:
    layer, x = nn.Linear(100, 300), large(200, 100)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(x)
        assert tanh_gelu(hidden).dtype == torch.bfloat16
        torch.testing.assert_close(tanh_gelu(hidden), of_torch(hidden), rtol=2**-7, atol=1e-5)
        assert tanh_gelu(x).dtype == torch.float32


def test_a_compiled_function_is_torchs() -> None:
    compiled = torch.compile(tanh_gelu, backend="eager", fullgraph=True)
    assert torch.equal(compiled(large()), of_torch(large()))


def test_a_symbolic_trace_has_torchs_function() -> None:
    graph = torch.fx.symbolic_trace(tanh_gelu)
    x = torch.linspace(-3, 3, 7)
    assert torch.equal(graph(x), tanh_gelu(x))


FUNCTIONS = {
    "gelu_tanh": (tanh_gelu, exact),
    "gelu_exact": (exact_gelu, lambda x: x / 2 * torch.erfc(-x / 2**0.5)),
}
NUMBERS = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("size", [5, 1 << 16, (1 << 19) + 37])
def test_every_number_of_bfloat16(isa: str, name: str, size: int) -> None:
    if isa == "reference":
        pytest.skip("torch's")
    x = NUMBERS.repeat(-(-size // (1 << 16)))[-size:]
    finite = x.abs() < 1e18
    wide = x[finite].double().requires_grad_()
    wanted = FUNCTIONS[name][1](wide)
    [slope] = torch.autograd.grad(wanted.sum(), wide)
    y = kernels.gelu(name, x, None)
    limit = 2**-8 * wanted.abs() + 3e-7 * wide.abs().clamp(max=20) + 1e-38
    assert ((y[finite].double() - wanted).abs() <= limit).all()
    assert y[x.isnan()].isnan().all()
    found = kernels.gelu(name, x, torch.full_like(x, 3.0))[finite].double()
    assert ((found - 3 * slope).abs() <= 2**-8 * (3 * slope).abs() + 2e-6).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_table_has_the_bits_of_the_function(isa: str, name: str) -> None:
    if isa == "reference":
        pytest.skip("torch's")
    x = large(1 << 19).bfloat16()
    grad = large(1 << 19).roll(7).bfloat16()
    for given in (None, grad):
        whole = kernels.gelu(name, x, given)
        parts = [slice(begin, begin + 4096) for begin in range(0, x.numel(), 4096)]
        few = [kernels.gelu(name, x[part], None if given is None else given[part]) for part in parts]
        assert torch.equal(whole, torch.cat(few))


@pytest.mark.skipif("v4_amx" not in matrix_units(), reason="this machine does not have v4_amx")
def test_exact_in_bfloat16_with_a_matrix_unit(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
    x = large().bfloat16().requires_grad_()
    grad = large().roll(3).bfloat16()
    [found] = torch.autograd.grad(exact_gelu(x), x, grad)
    assert calls == ["forward", "backward"]
    [wanted] = torch.autograd.grad(functional.gelu(x), x, grad)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-5)
    [found] = torch.autograd.grad(exact_gelu(x), x, grad.float().to(torch.bfloat16), create_graph=True)
    assert found.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_exact_elsewhere_is_torchs(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(gelu, "matrix_unit", lambda: "")
    assert torch.equal(exact_gelu(large().to(dtype)), functional.gelu(large().to(dtype)))
