"""Layer norms and sums under autocast to bfloat16: values and gradients, and what torch computes instead."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional

from rarefy.decoder.layers import LayerNorm
from rarefy.kernels import norm_for_products, plus
from rarefy.kernels.dense import calls
from rarefy.kernels.dense.norm import norm_gradients
from rarefy.kernels.instruction_sets import instruction_set

COMPILED = pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")
AUTOCAST = {"device_type": "cpu", "dtype": torch.bfloat16}
SHAPES = [(3, 2), (2, 3, 5), (7, 16), (4, 17), (2, 63), (5, 64), (3, 100), (1, 129), (300, 768)]


def inputs(
    *shape: int, weight: bool = True, bias: bool = True
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape) + 2).requires_grad_()
    vectors = (torch.randn(shape[-1], requires_grad=True) if wanted else None for wanted in (weight, bias))
    return x, next(vectors), next(vectors)


def exact(given: tuple[Tensor | None, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The norm and its gradients in float64."""
    wide = [None if tensor is None else tensor.detach().double().requires_grad_() for tensor in given]
    assert wide[0] is not None
    y = functional.layer_norm(wide[0], wide[0].shape[-1:], wide[1], wide[2], 1e-5)
    return y, *torch.autograd.grad(y, [tensor for tensor in wide if tensor is not None], grad.double())


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that were called."""
    found = list[str]()

    def counted(name: str) -> Callable[..., object]:
        original = getattr(calls, name)
        return lambda *given: (found.append(name), original(*given))[1]

    for name in ("norm", "norm_gradients", "add_part"):
        monkeypatch.setattr(calls, name, counted(name))
    return found


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weight, bias", [(True, True), (True, False), (False, False)])
def test_values_and_gradients(isa: str, shape: tuple[int, ...], weight: bool, bias: bool) -> None:
    given = inputs(*shape, weight=weight, bias=bias)
    grad = torch.randn(shape).bfloat16()
    with torch.autocast(**AUTOCAST):
        y = norm_for_products(*given, 1e-5)
    assert y.dtype == (torch.float32 if isa == "reference" else torch.bfloat16)
    found = torch.autograd.grad(y, [t for t in given if t is not None], grad.to(y.dtype))
    wanted = exact(given, grad)
    torch.testing.assert_close(y.double(), wanted[0], rtol=2**-8, atol=1e-5)
    for part, whole in zip(found, wanted[1:], strict=True):
        assert part.dtype == torch.float32
        torch.testing.assert_close(part.double(), whole, rtol=1e-4, atol=1e-4 * float(whole.abs().max() + 1))


@COMPILED
def test_what_is_rounded_is_the_norm_of_torch() -> None:
    given = inputs(40, 768)
    with torch.autocast(**AUTOCAST), torch.no_grad():
        rounded = norm_for_products(*given, 1e-5)
    whole = functional.layer_norm(given[0], (768,), given[1], given[2], 1e-5).bfloat16()
    assert (rounded != whole).sum() < 0.01 * whole.numel()
    torch.testing.assert_close(rounded, whole, rtol=2**-7, atol=1e-6)


@COMPILED
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_bits_for_as_many_threads(threads: int) -> None:
    torch.set_num_threads(threads)
    given = inputs(500, 300)
    grad = torch.randn(500, 300).bfloat16()
    runs = list[tuple[Tensor, ...]]()
    for _ in range(3):
        with torch.autocast(**AUTOCAST):
            y = norm_for_products(*given, 1e-5)
        runs.append((y, *torch.autograd.grad(y, [t for t in given if t is not None], grad)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@COMPILED
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_spoils_no_other(value: float) -> None:
    given = inputs(4, 32)
    with torch.no_grad():
        given[0][1, 5] = value
    with torch.autocast(**AUTOCAST):
        y = norm_for_products(*given, 1e-5)
    assert y[1].isnan().any()
    assert y[[0, 2, 3]].isfinite().all()


def test_gradients_in_operations_of_torch() -> None:
    x, weight, bias = (t.detach().double().requires_grad_() for t in inputs(3, 7) if t is not None)
    grad = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    for found, wanted in zip(
        norm_gradients(grad, x, weight, bias, 1e-5), exact((x, weight, bias), grad)[1:], strict=True
    ):
        assert found is not None
        torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(lambda *given: norm_gradients(*given, None, 1e-5)[:2], (grad, x, weight))


@COMPILED
def test_second_derivatives() -> None:
    given = inputs(4, 24)
    with torch.autocast(**AUTOCAST):
        y = norm_for_products(*given, 1e-5)
    [first] = torch.autograd.grad(y.float().square().sum(), given[0], create_graph=True)
    [found] = torch.autograd.grad(first.square().sum(), given[0])
    wide = given[0].detach().double().requires_grad_()
    whole = functional.layer_norm(wide, (24,), *(t.double() for t in given[1:] if t is not None), 1e-5)
    [first] = torch.autograd.grad(whole.square().sum(), wide, create_graph=True)
    [wanted] = torch.autograd.grad(first.square().sum(), wide)
    assert (found - wanted).norm() < 2e-2 * wanted.norm()


@COMPILED
def test_where_kernels_run(made: list[str]) -> None:
    x, weight, bias = inputs(8, 32)
    with torch.autocast(**AUTOCAST):
        plus(x, norm_for_products(x, weight, bias, 1e-5)).sum().backward()
        with torch.no_grad():
            norm_for_products(x, weight, bias, 1e-5)
    assert made == ["norm", "add_part", "norm_gradients", "norm"]


def test_what_torch_computes_instead(made: list[str]) -> None:
    x, weight, bias = inputs(8, 32)
    assert norm_for_products(x, weight, bias, 1e-5).dtype == torch.float32
    with torch.autocast("cpu", torch.float16):
        norm_for_products(x, weight, bias, 1e-5)
    with torch.autocast(**AUTOCAST):
        norm_for_products(x.double(), None, None, 1e-5)
        norm_for_products(x.t().contiguous().t(), weight, bias, 1e-5)
        norm_for_products(x[:0], weight, bias, 1e-5)
        torch.func.vmap(lambda row: norm_for_products(row, None, None, 1e-5))(x.detach())
        with forward_ad.dual_level():
            norm_for_products(x, weight, bias, 1e-5)
        compiled = torch.compile(norm_for_products, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(
            compiled(x, weight, bias, 1e-5), functional.layer_norm(x, (32,), weight, bias)
        )
        assert torch.equal(plus(x, x), x + x)
        part = torch.ones(32, dtype=torch.bfloat16)
        assert torch.equal(plus(x, part), x + part)
    assert not made


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17, 100_003])
def test_sums(isa: str, size: int) -> None:
    stream, part = torch.randn(size, requires_grad=True), torch.randn(size).bfloat16().requires_grad_()
    total, grad = plus(stream, part), torch.randn(size)
    assert torch.equal(total, stream + part)
    found = torch.autograd.grad(total, [stream, part], grad)
    assert torch.equal(found[0], grad)
    assert torch.equal(found[1], grad.bfloat16())
    assert not plus(stream.detach(), part.detach()).requires_grad


def test_only_what_wants_a_gradient_gets_one(isa: str) -> None:
    x, weight, bias = inputs(4, 20)
    with torch.autocast(**AUTOCAST):
        norm_for_products(x.detach(), weight, bias, 1e-5).float().sum().backward()
        plus(x, torch.ones(4, 20, dtype=torch.bfloat16)).sum().backward()
    assert weight is not None and weight.grad is not None
    assert x.grad is not None and torch.equal(x.grad, torch.ones(4, 20))


def test_the_module_is_a_layer_norm() -> None:
    module = LayerNorm(8)
    assert isinstance(module, nn.LayerNorm)
    x = torch.randn(3, 8)
    assert torch.equal(module(x), nn.LayerNorm(8)(x))


@pytest.mark.parametrize("is_affine", [True, False])
def test_another_width_is_refused(is_affine: bool) -> None:
    layer = LayerNorm(8, elementwise_affine=is_affine)
    with torch.autocast(**AUTOCAST), pytest.raises(RuntimeError, match="normalized_shape"):
        layer(torch.randn(4, 16))
    with torch.autocast(**AUTOCAST), pytest.raises(RuntimeError, match="weight"):
        norm_for_products(torch.randn(4, 16), torch.ones(8), None, 1e-5)


def test_second_derivatives_of_one_row() -> None:
    given = inputs(5)
    with torch.autocast(**AUTOCAST):
        y = norm_for_products(*given, 1e-5)
    found = torch.autograd.grad(y, given, torch.ones_like(y), create_graph=True)
    assert [part.shape for part in found] == 3 * [(5,)]
