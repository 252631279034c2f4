"""Causal attention with the matrix unit: values and gradients, and everything that torch has to compute instead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from rarefy.decoder import attention
from rarefy.decoder.attention import causal_attention
from rarefy.kernels import native_attention, takes_attention
from rarefy.kernels.dense.attention_kernels import gradients
from rarefy.kernels.instruction_sets import matrix_units


@pytest.fixture
def unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that has the unit, or a build that computes the same without."""
    if "v4_amx" not in matrix_units():
        pytest.skip("this machine does not have v4_amx")
    monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")


@pytest.fixture
def calls(unit: None, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the queries that went to the kernel."""
    found = list[tuple[int, ...]]()

    def counted(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found.append((*query.shape,))
        return native_attention(query, key, value)

    monkeypatch.setattr(attention, "native_attention", counted)
    return found


def heads_of(*shape: int, deviation: float = 1.0) -> list[Tensor]:
    """Queries, keys and values [samples, heads, length, size], strided as a model's."""
    samples, number, length, size = shape
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(3, samples, length, number, size, generator=generator)
    drawn[:2] *= deviation
    return [heads.bfloat16().transpose(1, 2).requires_grad_() for heads in drawn]


def grad_of(heads: list[Tensor]) -> Tensor:
    samples, number, length, size = heads[0].shape
    return torch.randn(samples, length, number, size, generator=torch.Generator().manual_seed(1)).bfloat16()


def parts(mixed: Tensor, heads: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Values and gradients."""
    return mixed, *torch.autograd.grad(mixed, heads, grad)


def of_torch(heads: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return parts(scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2), heads, grad)


def exact(heads: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return of_torch([tensor.detach().double().requires_grad_() for tensor in heads], grad.double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


SHAPES = [
    (2, 3, 32, 64),
    (1, 2, 33, 20),
    (2, 2, 63, 1),
    (1, 1, 64, 7),
    (2, 2, 65, 32),
    (3, 1, 96, 48),
    (1, 2, 127, 33),
    (1, 1, 129, 128),
    (1, 2, 300, 80),
    (1, 1, 513, 64),
    (1, 1, 1000, 16),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("deviation", [1, 3])
def test_values_and_gradients_are_as_exact_as_torchs(
    unit: None, shape: tuple[int, ...], deviation: float
) -> None:
    heads = heads_of(*shape, deviation=deviation)
    grad = grad_of(heads)
    assert takes_attention(*heads)
    found = parts(native_attention(*heads), heads, grad)
    for part, torchs, wanted in zip(found, of_torch(heads, grad), exact(heads, grad), strict=True):
        assert part.dtype == torch.bfloat16
        assert part.shape == wanted.shape
        assert error(part, wanted) < 1.2 * error(torchs, wanted) + 1e-3


@pytest.mark.parametrize("length", range(32, 100, 3))
def test_every_ragged_end(unit: None, length: int) -> None:
    heads = heads_of(1, 2, length, 40)
    grad = grad_of(heads)
    found = parts(native_attention(*heads), heads, grad)
    for part, wanted in zip(found, exact(heads, grad), strict=True):
        assert error(part, wanted) < 1e-2


@pytest.mark.parametrize("deviation", [1e2, 1e4, 1e6, 1e15])
def test_large_scores_stay_finite(unit: None, deviation: float) -> None:
    heads = heads_of(1, 1, 100, 64, deviation=deviation)
    grad = grad_of(heads)
    found = parts(native_attention(*heads), heads, grad)
    assert all(part.isfinite().all() for part in found)
    wanted = exact(heads, grad)
    # Gradients of queries and keys are differences of what is equal: all that rounding leaves of them.
    assert error(found[0], wanted[0]) < 1e-2
    assert error(found[3], wanted[3]) < 1e-2


def test_the_first_position_sees_itself_alone(unit: None) -> None:
    heads = heads_of(2, 2, 70, 24)
    assert torch.equal(native_attention(*heads)[:, 0], heads[2][:, :, 0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_position_does_not_see_later_keys_whatever_they_are(unit: None, value: float) -> None:
    heads = heads_of(1, 2, 140, 32)
    with torch.no_grad():
        heads[1][:, :, 100] = value
    mixed = native_attention(*heads)
    assert mixed[:, :100].isfinite().all()
    assert not mixed[:, 100].isfinite().any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_has_the_same_bits(unit: None, threads: int) -> None:
    heads = heads_of(3, 5, 200, 64)
    grad = grad_of(heads)
    torch.set_num_threads(1)
    wanted = parts(native_attention(*heads), heads, grad)
    torch.set_num_threads(threads)
    for _ in range(2):
        found = parts(native_attention(*heads), heads, grad)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_any_strides(unit: None) -> None:
    heads = heads_of(2, 3, 50, 32)
    grad = grad_of(heads)
    wanted = parts(native_attention(*heads), heads, grad)
    others = [tensor.detach().mT.contiguous().mT.requires_grad_() for tensor in heads]
    found = parts(native_attention(*others), others, grad.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    [expanded] = torch.autograd.grad(native_attention(*heads).sum(), heads[2])
    [ones] = torch.autograd.grad(native_attention(*heads), heads[2], torch.ones_like(grad))
    assert torch.equal(expanded, ones)


def test_gradients_in_operations_of_torch() -> None:
    heads = [torch.randn(2, 2, 9, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    grad = torch.randn(2, 9, 2, 4, dtype=torch.float64)
    for found, wanted in zip(gradients(*heads, grad), of_torch(heads, grad)[1:], strict=True):
        torch.testing.assert_close(found, wanted)
    assert torch.autograd.gradcheck(gradients, (*heads, grad.requires_grad_()), atol=1e-6)


def test_second_derivatives(unit: None) -> None:
    heads = heads_of(1, 2, 40, 16)
    mixed = native_attention(*heads)
    first = torch.autograd.grad(mixed.float().square().sum(), heads, create_graph=True)
    found = torch.autograd.grad(sum(part.float().square().sum() for part in first), heads)
    wide = [tensor.detach().double().requires_grad_() for tensor in heads]
    with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
        mixed = scaled_dot_product_attention(*wide, is_causal=True)
    first = torch.autograd.grad(mixed.square().sum(), wide, create_graph=True)
    wanted = torch.autograd.grad(sum(part.square().sum() for part in first), wide)
    for part, whole in zip(found, wanted, strict=True):
        assert error(part, whole) < 2e-2


def test_many_gradients_at_once(unit: None) -> None:
    heads = heads_of(1, 1, 34, 8)
    mixed = native_attention(*heads)
    grads = torch.stack([torch.ones_like(mixed), 2 * torch.ones_like(mixed)])
    [found] = torch.autograd.grad(mixed, heads[2], grads, is_grads_batched=True, retain_graph=True)
    [wanted] = torch.autograd.grad(mixed, heads[2], grads[0])
    torch.testing.assert_close(found, torch.stack([wanted, 2 * wanted]), rtol=2e-2, atol=1e-2)


def test_checkpointing_changes_nothing(unit: None) -> None:
    heads = heads_of(1, 2, 60, 16)
    again: Any = checkpoint(native_attention, *heads, use_reentrant=False)
    grad = grad_of(heads)
    pairs = zip(parts(again, heads, grad), parts(native_attention(*heads), heads, grad), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_was_saved_comes_back_as_float32(unit: None) -> None:
    heads = heads_of(1, 2, 60, 16)
    grad = grad_of(heads)
    wanted = parts(native_attention(*heads), heads, grad)
    with saved_tensors_hooks(lambda saved: saved, Tensor.float):
        mixed = native_attention(*heads)
    found = parts(mixed, heads, grad)
    assert all(error(a, b.double()) < 2e-2 for a, b in zip(found, wanted, strict=True))


def test_what_the_decoder_sends_here(calls: list[tuple[int, ...]]) -> None:
    heads = heads_of(1, 2, 40, 16)
    causal_attention(*heads)
    with torch.no_grad():
        causal_attention(*heads)
    with torch.autocast("cpu", torch.bfloat16):
        causal_attention(*heads)
    assert calls == 3 * [(1, 2, 40, 16)]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of torch's kernel under vmap
def test_what_torch_computes_instead(calls: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    heads = heads_of(1, 2, 40, 16)
    causal_attention(*heads, dropout_rate=0.5)
    causal_attention(*(tensor.double() for tensor in heads))
    causal_attention(*heads_of(1, 2, 31, 16))
    causal_attention(*heads_of(0, 2, 40, 16))
    with torch.autocast("cpu", torch.float16):
        causal_attention(*heads)
    plain = [tensor.detach() for tensor in heads]
    torch.func.grad(lambda *given: causal_attention(*given).float().sum())(*plain)
    torch.func.vmap(causal_attention)(*(tensor.unsqueeze(0) for tensor in plain))
    with forward_ad.dual_level():
        assert not takes_attention(*heads)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    compiled(*heads).float().sum().backward()
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    causal_attention(*heads)
    assert not calls


def test_other_machines_go_on_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    assert not takes_attention(*heads_of(1, 2, 40, 16))
