"""Causal attention in float32 with every instruction set: values and gradients, and what torch computes instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from rarefy.decoder import attention
from rarefy.decoder.attention import causal_attention
from rarefy.kernels import available, native_attention, takes_attention
from rarefy.kernels.dense import attention_kernels as rule

SETS = [name for name in available() if name != "reference"]
pytestmark = pytest.mark.skipif(not SETS, reason="the kernels were not built")


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One instruction set after the other, each taken wherever it can compute."""
    monkeypatch.setenv("RAREFY_KERNELS", request.param)
    monkeypatch.setattr(rule, "on_intel", lambda: True)
    return request.param


def heads_of(*shape: int, deviation: float = 1.0) -> list[Tensor]:
    """Queries, keys and values [samples, heads, length, size], strided as a model's."""
    samples, number, length, size = shape
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(3, samples, length, number, size, generator=generator)
    drawn[:2] *= deviation
    return [heads.transpose(1, 2).requires_grad_() for heads in drawn]


def grad_of(heads: list[Tensor]) -> Tensor:
    samples, number, length, size = heads[0].shape
    return torch.randn(samples, length, number, size, generator=torch.Generator().manual_seed(1))


def parts(mixed: Tensor, heads: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Values and gradients."""
    return mixed, *torch.autograd.grad(mixed, heads, grad)


def wide(heads: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().double().requires_grad_() for tensor in heads]


def exact(heads: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """In float64."""
    doubles = wide(heads)
    mixed = scaled_dot_product_attention(*doubles, is_causal=True).transpose(1, 2)
    return parts(mixed, doubles, grad.double())


def error(found: Tensor, wanted: Tensor) -> float:
    # Gradients of a single position's query and key are 0: what rounding leaves of products is measured against theirs.
    norm = max(float(wanted.detach().norm()), wanted[0, 0].numel() ** 0.5)
    return float((found.detach().double() - wanted.detach()).norm()) / norm


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(
    samples=st.integers(1, 2),
    number=st.integers(1, 3),
    length=st.integers(1, 230),
    size=st.integers(1, 150),
)
def test_values_and_gradients_of_any_shape(
    kernels: str, samples: int, number: int, length: int, size: int
) -> None:
    heads = heads_of(samples, number, length, size)
    grad = grad_of(heads)
    found = parts(native_attention(*heads), heads, grad)
    for part, wanted in zip(found, exact(heads, grad), strict=True):
        assert part.dtype == torch.float32
        assert part.shape == wanted.shape
        assert error(part, wanted) < 3e-6


# Ends of groups of 6 rows, of vectors, and of blocks of 96 queries and 192 keys.
@pytest.mark.parametrize("length", [6, 16, 64, 95, 96, 97, 191, 192, 193, 198, 288, 385, 577])
@pytest.mark.parametrize("size", [16, 64, 65])
def test_ends_of_blocks(kernels: str, length: int, size: int) -> None:
    heads = heads_of(1, 2, length, size)
    grad = grad_of(heads)
    found = parts(native_attention(*heads), heads, grad)
    assert all(error(*pair) < 3e-6 for pair in zip(found, exact(heads, grad), strict=True))


@pytest.mark.parametrize("deviation", [1e2, 1e3, 1e4, 1e8])
def test_large_scores_stay_finite(kernels: str, deviation: float) -> None:
    heads = heads_of(1, 1, 300, 64, deviation=deviation)
    grad = grad_of(heads)
    found = parts(native_attention(*heads), heads, grad)
    assert all(part.isfinite().all() for part in found)
    wanted = exact(heads, grad)
    # Gradients of queries and keys are differences of what is equal: all that rounding leaves of them.
    assert error(found[0], wanted[0]) < 1e-2
    assert error(found[3], wanted[3]) < 1e-2


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_of_a_million_are_as_exact_as_others(kernels: str, sign: int) -> None:
    # Whole numbers: every score is exact in float32, and only their differences count.
    generator = torch.Generator().manual_seed(0)
    query = torch.tensor([2000.0, 1, 1, 1]).expand(1, 1, 250, 4).clone()
    key = torch.randint(-3, 4, (1, 1, 250, 4), generator=generator).float()
    key[..., 0] = sign * 1000
    heads = [
        tensor.requires_grad_() for tensor in (query, key, torch.randn(1, 1, 250, 4, generator=generator))
    ]
    grad = grad_of(heads)
    found, wanted = parts(native_attention(*heads), heads, grad), exact(heads, grad)
    assert error(found[0], wanted[0]) < 3e-6
    assert error(found[3], wanted[3]) < 3e-6
    assert error(found[2], wanted[2]) < 1e-3  # products with queries of 2000


def test_the_first_position_sees_itself_alone(kernels: str) -> None:
    heads = heads_of(2, 2, 70, 24)
    assert torch.equal(native_attention(*heads)[:, 0], heads[2][:, :, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [1, 2])
@pytest.mark.parametrize("position", [1, 100, 193])
def test_a_position_takes_nothing_from_later_ones(
    kernels: str, value: float, which: int, position: int
) -> None:
    heads = heads_of(1, 2, 250, 32)
    grad = grad_of(heads)
    wanted = native_attention(*heads)
    with torch.no_grad():
        heads[which][:, :, position] = value
    mixed = native_attention(*heads)
    assert torch.equal(mixed[:, :position], wanted[:, :position])
    assert not mixed[:, position].isfinite().any()
    grad[:, position:] = 0
    of_query = torch.autograd.grad(mixed, heads[0], grad)[0]
    assert of_query[:, :, :position].isfinite().all()


@pytest.mark.parametrize("position", [2, 100, 193])
def test_a_gradient_reaches_nothing_later(kernels: str, position: int) -> None:
    heads = heads_of(1, 2, 250, 32)
    grad = grad_of(heads)
    wanted = parts(native_attention(*heads), heads, grad)
    grad[:, position] = torch.nan
    found = parts(native_attention(*heads), heads, grad)
    for part, whole in zip(found[2:], wanted[2:], strict=True):
        assert torch.equal(part[:, :, position + 1 :], whole[:, :, position + 1 :])
        assert part[:, :, : position + 1].isnan().all()
    others = [i for i in range(250) if i != position]
    assert torch.equal(found[1][:, :, others], wanted[1][:, :, others])
    assert found[1][:, :, position].isnan().all()


def test_infinitely_small_scores_wait_for_a_finite_one(kernels: str) -> None:
    query, key, value = (tensor.detach().abs() for tensor in heads_of(1, 1, 300, 8))
    key[:, :, :200] = -torch.inf  # longer than a block of keys
    mixed = native_attention(query, key, value)
    assert mixed[:, :200].isnan().all()
    wanted = scaled_dot_product_attention(
        query, key.nan_to_num(neginf=-1e9), value, is_causal=True
    ).transpose(1, 2)
    torch.testing.assert_close(mixed[:, 200:], wanted[:, 200:])


def test_rising_scores_scale_what_was_mixed_before(kernels: str) -> None:
    heads = [tensor.detach() for tensor in heads_of(1, 1, 600, 8)]
    heads[0][:] = 1
    heads[1][:] = torch.linspace(0, 60, 600)[:, None]
    heads = [tensor.requires_grad_() for tensor in heads]
    grad = grad_of(heads)
    found = parts(native_attention(*heads), heads, grad)
    for part, wanted in zip(found, exact(heads, grad), strict=True):
        assert error(part, wanted) < 2e-5  # scores of 170 are rounded to 1e-5


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_has_the_same_bits(kernels: str, threads: int) -> None:
    heads = heads_of(3, 5, 200, 64)
    grad = grad_of(heads)
    torch.set_num_threads(1)
    wanted = parts(native_attention(*heads), heads, grad)
    torch.set_num_threads(threads)
    for _ in range(2):
        found = parts(native_attention(*heads), heads, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_any_strides(kernels: str) -> None:
    heads = heads_of(2, 3, 50, 32)
    grad = grad_of(heads)
    wanted = parts(native_attention(*heads), heads, grad)
    others = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in heads]
    found = parts(native_attention(*others), others, grad.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    [expanded] = torch.autograd.grad(native_attention(*heads).sum(), heads[2])
    [ones] = torch.autograd.grad(native_attention(*heads), heads[2], torch.ones_like(grad))
    assert torch.equal(expanded, ones)


def test_second_derivatives(kernels: str) -> None:
    heads = heads_of(1, 2, 40, 16)
    mixed = native_attention(*heads)
    first = torch.autograd.grad(mixed.square().sum(), heads, create_graph=True)
    found = torch.autograd.grad(sum(part.square().sum() for part in first), heads)
    doubles = wide(heads)
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
        mixed = scaled_dot_product_attention(*doubles, is_causal=True)
    first = torch.autograd.grad(mixed.square().sum(), doubles, create_graph=True)
    wanted = torch.autograd.grad(sum(part.square().sum() for part in first), doubles)
    assert all(error(*pair) < 1e-5 for pair in zip(found, wanted, strict=True))


def test_many_gradients_at_once(kernels: str) -> None:
    heads = heads_of(1, 1, 34, 8)
    mixed = native_attention(*heads)
    grads = torch.stack([torch.ones_like(mixed), 2 * torch.ones_like(mixed)])
    [found] = torch.autograd.grad(mixed, heads[2], grads, is_grads_batched=True, retain_graph=True)
    [wanted] = torch.autograd.grad(mixed, heads[2], grads[0])
    torch.testing.assert_close(found, torch.stack([wanted, 2 * wanted]))


def test_checkpointing_changes_nothing(kernels: str) -> None:
    heads = heads_of(1, 2, 60, 16)
    again: Any = checkpoint(native_attention, *heads, use_reentrant=False)
    grad = grad_of(heads)
    pairs = zip(parts(again, heads, grad), parts(native_attention(*heads), heads, grad), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_was_saved_comes_back_in_other_forms(kernels: str) -> None:
    heads = heads_of(1, 2, 60, 16)
    grad = grad_of(heads)
    wanted = parts(native_attention(*heads), heads, grad)
    for back in (Tensor.double, lambda saved: saved.mT.contiguous().mT):
        with saved_tensors_hooks(lambda saved: saved, back):
            mixed = native_attention(*heads)
        found = parts(mixed, heads, grad)
        assert all(error(a, b.double()) < 3e-6 for a, b in zip(found, wanted, strict=True))


def test_the_kernels_are_switched_off_before_the_backward_pass(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heads = heads_of(1, 2, 60, 16)
    grad = grad_of(heads)
    wanted = parts(native_attention(*heads), heads, grad)
    mixed = native_attention(*heads)
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    found = parts(mixed, heads, grad)
    assert all(error(a, b.double()) < 3e-6 for a, b in zip(found, wanted, strict=True))


@pytest.fixture
def calls(kernels: str, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that went to the kernel."""
    found = list[tuple[int, ...]]()

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found.append((*query.shape,))
        return native_attention(query, key, value)

    monkeypatch.setattr(attention, "native_attention", counted)
    return found


def test_what_the_decoder_sends_here(calls: list[tuple[int, ...]]) -> None:
    torch.set_num_threads(2)
    heads = heads_of(1, 2, 64, 16)
    causal_attention(*heads)
    with torch.no_grad():
        causal_attention(*heads)
    assert calls == 2 * [(1, 2, 64, 16)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's kernel under vmap
def test_what_torch_computes_instead(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    heads = heads_of(1, 2, 64, 16)
    causal_attention(*heads, dropout_rate=0.5)
    causal_attention(*wide(heads))
    causal_attention(*heads_of(1, 2, 63, 16))
    causal_attention(*heads_of(0, 2, 64, 16))
    causal_attention(*heads_of(1, 1, 64, 16))  # one head for two threads
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_attention(*heads).dtype == torch.bfloat16
    plain = [tensor.detach() for tensor in heads]
    torch.func.grad(lambda *given: causal_attention(*given).sum())(*plain)
    torch.func.vmap(causal_attention)(*(tensor.unsqueeze(0) for tensor in plain))
    with forward_ad.dual_level():
        assert not takes_attention(*heads)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    compiled(*heads).sum().backward()
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    causal_attention(*heads)
    assert not calls


def test_processors_that_were_not_measured_go_on_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = heads_of(1, 2, 64, 16)
    monkeypatch.setenv("RAREFY_KERNELS", SETS[0])  # no 512-bit vectors
    assert not takes_attention(*heads)
