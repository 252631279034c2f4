"""Tiles in float16 against float64, the kernels with float32 tiles, and a dense product in bfloat16."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import Panels, half_native, half_obstacle, infer, sparse_linear
from rarefy.kernels.instruction_sets import takes_half

needs_half = pytest.mark.skipif(bool(half_obstacle()), reason=half_obstacle())
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
BOTH = [torch.bfloat16, torch.float16]
TINY = 2.0**-26  # of the largest product: what has no digits left beside it


@dataclass
class Case:
    rows: int
    columns: int
    tokens: int
    density: float
    dtype: torch.dtype = torch.bfloat16
    needs: tuple[bool, bool, bool] = (True, True, True)
    threads: int = 2
    seed: int = 0


@dataclass
class Layer:
    """What one call computes with, and what it must give."""

    panels: Panels
    values: Tensor
    bias: Tensor
    x: Tensor
    grad: Tensor

    def results(self, half: bool = True, needs: tuple[bool, bool, bool] = (True, True, True)) -> list[Tensor]:
        panels = replace(self.panels, half=half)
        y = sparse_linear(self.x, self.values, self.bias, panels)
        found = panels.gradients(self.grad, self.x, self.values, list(needs))
        return [y, *found]

    @property
    def weight(self) -> Tensor:
        return self.panels.dense(self.values).double()

    def exact(self) -> list[Tensor]:
        x, grad = self.x.double(), self.grad.double()
        of_weight = self.panels.gather((grad.t() @ x).float())
        return [x @ self.weight.t() + self.bias.double(), grad @ self.weight, of_weight, grad.sum(0)]

    def sizes(self) -> list[Tensor]:
        """What the products of each result add up to without their signs, and what is tiny beside the largest."""
        x, grad, weight = self.x.double().abs(), self.grad.double().abs(), self.weight.abs()
        of_rows, of_columns = (weight.amax(side).clamp_min(0) for side in (1, 0))
        floor_y = x.amax(1)[:, None] * of_rows * TINY * weight.shape[1]
        floor_x = grad.amax(1)[:, None] * of_columns * TINY * weight.shape[0]
        largest = (x.amax(1) * grad.amax(1)).max() * TINY * len(x)
        return [
            x @ weight.t() + self.bias.double().abs() + 512 * floor_y,
            grad @ weight + 512 * floor_x,
            self.panels.gather((grad.t() @ x + 512 * largest).float()),
            grad.sum(0),
        ]


def layer(case: Case, scale: float = 1.0) -> Layer:
    torch.manual_seed(case.seed)
    mask = torch.rand(case.rows, case.columns) < case.density
    if case.rows > 2:
        mask[1], mask[2] = False, True
    panels = Panels.from_mask(mask)
    return Layer(
        panels,
        torch.randn(panels.nonzeros) * scale,
        torch.randn(case.rows) * scale,
        torch.randn(case.tokens, case.columns).to(case.dtype),
        torch.randn(case.tokens, case.rows).to(case.dtype),
    )


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was done with tiles in float16."""
    calls: list[bool] = []
    for name in ("forward", "backward"):
        original = getattr(half_native, name)

        def call(*arguments: Any, original: Any = original) -> Any:
            found = original(*arguments)
            calls.append(found is not None)
            return found

        monkeypatch.setattr(half_native, name, call)
    return calls


cases = st.builds(
    Case,
    rows=st.sampled_from([1, 3, 15, 16, 33, 64, 70, 200]),
    columns=st.sampled_from([1, 5, 16, 31, 32, 64, 97, 300]),
    tokens=st.sampled_from([64, 65, 79, 96, 97, 127, 130, 161, 200, 256, 270, 520]),
    density=st.sampled_from([0.02, 0.05, 0.4, 1.0]),
    dtype=st.sampled_from(BOTH),
    needs=st.sampled_from(
        [
            (True, True, True),
            (True, False, False),
            (False, True, False),
            (False, True, True),
            (True, False, True),
        ]
    ),
    threads=st.sampled_from([1, 2, 3, 5]),
    seed=st.integers(0, 9),
)
LARGE = [
    Case(800, 1100, 70, 0.3, threads=3),  # several panels each way, rows of more than one sum
    Case(3300, 300, 130, 0.02),  # several blocks of rows in the forward pass
    Case(300, 1900, 67, 0.05, threads=5),  # ... and in the backward pass
    Case(300, 500, 1100, 0.2, threads=1),  # longer tiles in both passes, and the end of one
    Case(40, 1500, 100, 1.0),  # rows that are longer than a sum inside one panel
    Case(1500, 40, 100, 1.0),
    Case(4, 70000, 70, 0.003),  # columns that do not fit 16 bits
]


def check(case: Case) -> None:
    torch.set_num_threads(case.threads)
    one = layer(case)
    found = one.results(needs=case.needs)
    digits = 2.0 ** (-8 if case.dtype is torch.bfloat16 else -11)
    wanted = (True, *case.needs)
    lengths = (case.columns, case.rows, case.tokens, case.tokens)
    for got, exact, size, needed, length in zip(
        found, one.exact(), one.sizes(), wanted, lengths, strict=True
    ):
        if not needed:
            assert not got.numel()
            continue
        assert got.shape == exact.shape
        # The result is rounded once, the smallest ones of float16 to a multiple of 2^-24.
        least = 2.0**-25 if got.dtype is torch.float16 else 0.0
        allowed = digits * exact.abs() + least + rounding_of(length) * size
        assert bool(((got.double() - exact).abs() <= allowed).all())


def rounding_of(length: int) -> float:
    """What sums of `length` products may be off by, as a share of the sum of their absolute values.

    Values are rounded to float16 and so is each of at most 128 partial sums, by 2^-11 at most. Such errors grow with
    the square root of their number (Higham and Mary, 2019, doi:10.1137/18M1226312).
    """
    return 2.0**-11 * (2 + math.sqrt(min(length, 128)))


def test_what_sums_in_float16_may_be_off_by_is_what_they_are_off_by():
    generator = torch.Generator().manual_seed(0)
    for length in (1, 8, 70, 128):
        x = torch.randn(length, 20000, generator=generator).half().double()
        w = torch.randn(length, 1, generator=generator).double()
        total = torch.zeros(20000, dtype=torch.half)
        for product in x * w.half().double():
            total = (total.double() + product).half()
        off = (total.double() - (x * w).sum(0)).abs() / (x * w).abs().sum(0)
        assert rounding_of(length) / 6 < float(off.max()) < rounding_of(length)


@needs_half
@FUZZ
@given(case=cases)
@example(case=Case(70, 300, 64, 1.0, torch.float16, seed=2))  # partial sums that stay far from zero
def test_ragged_shapes(counted, case):
    counted.clear()
    check(case)
    # A weight without connections has nothing to multiply.
    assert counted == [True, True] or not layer(case).panels.nonzeros


@needs_half
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_shapes(counted, case):
    check(case)
    assert counted == [True, True]


def relative(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact.double()).norm() / exact.double().norm())


@needs_half
@pytest.mark.parametrize("positive", [False, True], ids=["normal", "positive activations"])
@pytest.mark.parametrize(
    ("rows", "columns", "density"), [(768, 768, 0.2), (768, 768, 0.05), (1024, 3072, 0.1), (2048, 700, 0.5)]
)
def test_errors_are_no_larger_than_those_of_a_dense_product_in_bfloat16(rows, columns, density, positive):
    one = layer(Case(rows, columns, 512, density))
    if positive:
        one.x = one.x.abs()
    dense = one.weight.bfloat16()
    rival = [
        torch.nn.functional.linear(one.x, dense, one.bias.bfloat16()),
        one.grad @ dense,
        one.panels.gather((one.grad.t() @ one.x).float()),
    ]
    for got, other, exact in zip(one.results(), rival, one.exact(), strict=False):
        assert relative(got, exact) <= relative(other, exact)


@needs_half
@pytest.mark.parametrize("exponent", [-60, -24, 24, 60])
def test_numbers_far_from_1_keep_their_digits(exponent):
    one, same = layer(Case(70, 300, 130, 0.1)), layer(Case(70, 300, 130, 0.1))
    factor = 2.0**exponent
    one.x, one.grad, one.values = one.x * factor, one.grad * factor, one.values / factor
    # y keeps its size, beside a bias; gradients of x too, that of the values is factor² as large.
    for got, expected, power in zip(one.results(), same.results(), (1, 1, factor**2, factor), strict=True):
        assert torch.equal(got, expected * power)


@needs_half
def test_each_token_and_each_row_has_a_scale_of_its_own():
    one = layer(Case(70, 300, 130, 0.1))
    one.x *= 10.0 ** torch.linspace(-18, 18, 130)[:, None].bfloat16()
    one.bias.zero_()
    rows = one.panels.positions() // 300
    one.values *= 10.0 ** torch.linspace(-9, 9, 70)[rows]
    got, exact = one.results()[0].double(), one.exact()[0]
    nonzero = exact.abs().sum(0) > 0
    errors = (got - exact)[:, nonzero].abs() / one.sizes()[0][:, nonzero]
    assert float(errors.max()) < 2.0**-7


@needs_half
def test_gradients_of_tokens_that_differ_a_million_times():
    one = layer(Case(70, 300, 256, 0.1))
    one.grad *= 10.0 ** torch.linspace(-6, 0, 256)[:, None].bfloat16()
    one.x *= 10.0 ** torch.linspace(0, -6, 256)[:, None].bfloat16()
    _, of_x, of_values, _ = one.results()
    _, exact_x, exact_values, _ = one.exact()
    assert relative(of_values, exact_values) < 2e-3
    assert float(((of_x.double() - exact_x).norm(dim=1) / exact_x.norm(dim=1)).max()) < 5e-3


@needs_half
@pytest.mark.parametrize("dtype", BOTH)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["x", "grad", "values"])
@pytest.mark.parametrize("place", [0, -1])
def test_what_is_not_finite_goes_to_the_float32_kernels(counted, dtype, value, where, place):
    one = layer(Case(37, 45, 67, 0.3, dtype))
    getattr(one, where).view(-1)[place] = value
    found = one.results()
    assert counted == [where == "grad", False]
    expected = one.results(half=False)
    for got, other in zip(found[where == "grad" :], expected[where == "grad" :], strict=True):
        assert torch.equal(got, other) or bool((got.isnan() == other.isnan()).all())
        assert torch.equal(got.nan_to_num(), other.nan_to_num())


@needs_half
def test_only_results_overflow_that_do_not_fit_their_dtype():
    one = layer(Case(37, 45, 67, 0.3))
    one.x = one.x.sign() * 3e38
    found, expected = one.results(), one.results(half=False)
    assert bool(expected[0].isinf().any()) and not bool(expected[0].isinf().all())
    inner = one.exact()[0].abs() < 3.3e38
    assert bool(found[0][inner].isfinite().all())
    assert torch.equal(found[1], one.results()[1]) and bool(found[1].isfinite().all())


@needs_half
def test_zeros_of_all_kinds():
    one = layer(Case(37, 45, 67, 0.3))
    one.x[3], one.grad[3], one.grad[5], one.values[:] = 0, 0, -0.0, 0
    y, of_x, of_values, of_bias = one.results()
    assert torch.equal(y, one.bias.bfloat16().expand_as(y)) and not bool(of_x.any())
    assert relative(of_values, one.exact()[2]) < 2e-3 and relative(of_bias, one.exact()[3]) < 1e-6


@needs_half
def test_the_smallest_numbers_of_bfloat16():
    one = layer(Case(37, 45, 67, 0.3))
    one.x = torch.full_like(one.x, 2.0**-130)  # denormal
    one.values = torch.full_like(one.values, 2.0**100)
    one.bias.zero_()
    assert torch.equal(one.results()[0].double(), one.exact()[0])


@needs_half
@pytest.mark.parametrize("tokens", [1, 8, 63])
def test_few_tokens_are_left_to_the_float32_kernels(counted, tokens):
    one = layer(Case(37, 45, tokens, 0.3))
    found = one.results()
    assert counted == [False, False]
    for got, other in zip(found, one.results(half=False), strict=True):
        assert torch.equal(got, other)


@needs_half
def test_a_bias_alone_is_left_to_the_float32_kernels(counted):
    one = layer(Case(37, 45, 67, 0.3))
    found = one.results(needs=(False, False, True))
    assert counted == [True, False]
    assert torch.equal(found[3], one.results(half=False)[3])


@needs_half
@pytest.mark.parametrize(
    ("of_x", "of_values"), [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)]
)
def test_without_autocast_nothing_changes(counted, of_x, of_values):
    one = layer(Case(37, 45, 67, 0.3))
    one.x, one.grad, one.values = one.x.to(of_x), one.grad.to(of_x), one.values.to(of_values)
    found = one.results()
    assert counted == [False, False]
    for got, other in zip(found, one.results(half=False), strict=True):
        assert torch.equal(got, other)


@needs_half
def test_the_same_bits_for_the_same_threads():
    one = layer(Case(300, 500, 1100, 0.2))
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for got, again in zip(one.results(), one.results(), strict=True):
            assert torch.equal(got, again)


@needs_half
def test_the_short_way_gives_the_same_bits(counted):
    one = layer(Case(37, 45, 67, 0.3))
    short = infer(one.x, one.values, one.bias, one.panels.layout, half=True)
    assert short is not None and torch.equal(short, one.results()[0])
    assert counted == [True, True, True]


@needs_half
def test_gradients_of_gradients_come_from_the_same_products():
    one = layer(Case(37, 45, 67, 0.3))
    x, values = one.x.clone().requires_grad_(), one.values.clone().requires_grad_()
    y = sparse_linear(x, values, one.bias, replace(one.panels, half=True))
    [of_x] = torch.autograd.grad(y, x, one.grad, create_graph=True)
    of_x.float().square().sum().backward()
    full, exact = one.values.double().requires_grad_(), one.grad.double()
    dense = torch.zeros(37 * 45, dtype=torch.float64).index_put((one.panels.positions(),), full)
    (exact @ dense.view(37, 45)).square().sum().backward()
    assert values.grad is not None and full.grad is not None
    assert relative(values.grad, full.grad) < 5e-3


def test_other_kernels_can_be_forced(monkeypatch):
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    assert not takes_half() and half_obstacle()
    one = layer(Case(37, 45, 67, 0.3))
    for got, other in zip(one.results(), one.results(half=False), strict=True):
        assert torch.equal(got, other)


def test_what_is_forced_must_exist(monkeypatch):
    monkeypatch.setenv("RAREFY_KERNELS", "v9")
    with pytest.raises(RarefyError, match="RAREFY_KERNELS: v9 is not available here"):
        takes_half()


@needs_half
def test_an_obstacle_names_the_variable(monkeypatch):
    monkeypatch.setenv("RAREFY_KERNELS", "v3")
    assert half_obstacle() == "RAREFY_KERNELS=v3 takes others"
    monkeypatch.setenv("RAREFY_KERNELS", "v4_bf16")  # a unit for blocks, beside which it stays
    assert takes_half() and not half_obstacle()
