"""Attention in bfloat16 that keeps its weights: about as exact as torch's, used for training alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from rarefy.decoder import attention, bfloat16_attention
from rarefy.decoder.attention import causal_attention


def heads_of(length: int, size: float = 1.0, samples: int = 2) -> list[Tensor]:
    """Queries, keys and values [samples, 3, length, 20], strided as a model's; scores have a deviation of `size`²."""
    generator = torch.Generator().manual_seed(length)
    drawn = torch.randn(3, samples, length, 3, 20, generator=generator)
    drawn[:2] *= size
    return [heads.bfloat16().transpose(1, 2).requires_grad_() for heads in drawn]


def exact(heads: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    """Attention and its gradients in float64."""
    wide = [tensor.detach().double().requires_grad_() for tensor in heads]
    mixed = scaled_dot_product_attention(*wide, is_causal=True).transpose(1, 2)
    return mixed, *torch.autograd.grad(mixed, wide, grad.double())


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found.detach().double() - wanted.detach()).norm() / wanted.detach().norm())


@pytest.fixture
def fast(monkeypatch):
    """A processor that has the instructions and no matrix unit, whatever it has."""
    monkeypatch.setattr(bfloat16_attention, "is_fast", lambda: True)
    monkeypatch.setattr(attention, "takes_attention", lambda *_: False)


@pytest.fixture
def calls(monkeypatch, fast):
    """The shapes of the queries that took this path."""
    found, attend = list[tuple[int, ...]](), bfloat16_attention.attend
    monkeypatch.setattr(
        bfloat16_attention,
        "attend",
        lambda query, *rest: (found.append((*query.shape,)), attend(query, *rest))[1],
    )
    return found


@pytest.mark.parametrize("length", [64, 127, 128, 129, 300, 512, 767])
@pytest.mark.parametrize("size", [1, 3])
def test_attention_and_gradients_are_those_of_float64(length, size, calls):
    heads = heads_of(length, size)
    mixed = causal_attention(*heads)
    grad = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    found = mixed, *torch.autograd.grad(mixed, heads, grad)
    assert calls
    limits = 4e-3, 1e-2, 1e-2, 5e-3
    for part, wanted, limit in zip(found, exact(heads, grad), limits, strict=True):
        assert part.dtype == torch.bfloat16
        assert error(part, wanted) < limit


def test_scores_are_not_rounded_to_bfloat16(fast):
    heads = heads_of(200, size=4)
    wanted, *_ = exact(heads, torch.ones(2, 200, 3, 20))
    weights = torch.softmax(
        (heads[0] @ heads[1].transpose(2, 3)).float() * 20**-0.5 + torch.full((200, 200), -torch.inf).triu(1),
        -1,
    )
    rounded = (weights.bfloat16() @ heads[2]).transpose(1, 2)
    assert 3 * error(causal_attention(*heads), wanted) < error(rounded, wanted)


def test_the_first_position_sees_itself_alone(fast):
    heads = heads_of(130)
    assert torch.equal(causal_attention(*heads)[:, 0], heads[2][:, :, 0])


def test_samples_go_a_few_at_a_time(calls, monkeypatch):
    heads = heads_of(130, samples=5)
    whole = causal_attention(*heads)
    assert calls == [(15, 128, 20), (15, 2, 20)]
    monkeypatch.setattr(attention, "_SCORES_AT_ONCE", 2 * 3 * 128 * 130)
    assert torch.equal(causal_attention(*heads), whole)
    assert [shape[0] for shape in calls[2:]] == [6, 6, 6, 6, 3, 3]


@pytest.mark.parametrize("samples, heads, size", [(0, 3, 8), (2, 0, 8), (2, 3, 0)])
def test_nothing_to_attend_to(samples, heads, size, fast):
    empty = torch.zeros(samples, heads, 64, size, dtype=torch.bfloat16, requires_grad=True)
    mixed = causal_attention(empty, empty, empty)
    assert mixed.shape == (samples, 64, heads, size)
    mixed.sum().backward()


def test_only_training_in_bfloat16_takes_this_path(calls):
    heads = heads_of(100)
    causal_attention(*(tensor.detach() for tensor in heads))
    with torch.no_grad():
        causal_attention(*heads)
    causal_attention(*(tensor.float() for tensor in heads))
    causal_attention(*heads, dropout_rate=0.5)
    causal_attention(*heads_of(63))
    causal_attention(*heads_of(768))
    assert not calls
    causal_attention(*heads)
    assert calls


def test_a_machine_without_the_instructions_goes_on_with_torch(calls, monkeypatch):
    monkeypatch.setattr(bfloat16_attention, "is_fast", lambda: False)
    causal_attention(*heads_of(100))
    assert not calls


def test_what_a_machine_must_have(monkeypatch):
    for has, wanted in (
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx512_bf16": True, "amx_bf16": True}, False),
        ({"avx512_bf16": False}, False),
        ({}, False),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda has=has: has, raising=False)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        assert bfloat16_attention.is_fast.__wrapped__() is wanted
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
        assert not bfloat16_attention.is_fast.__wrapped__()


def test_transforms_and_tracing_see_the_usual_operations(calls):
    heads = [tensor.detach() for tensor in heads_of(70)]

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return causal_attention(query, key, value).float().square().sum()

    torch.func.grad(loss)(*heads)
    compiled = torch.compile(causal_attention, backend="aot_eager", fullgraph=True)
    compiled(*heads_of(70)).float().sum().backward()
    assert not calls


def test_under_autocast(calls):
    heads = heads_of(100)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = causal_attention(*heads)
    assert torch.equal(mixed, causal_attention(*heads))
    found, wanted = (torch.autograd.grad(y.float().sum(), heads) for y in (mixed, causal_attention(*heads)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    before = len(calls)
    with torch.autocast("cpu", torch.bfloat16):
        causal_attention(heads[0], heads[1].float(), heads[2]).float().sum().backward()
    with torch.autocast("cpu", torch.float16):
        mixed = causal_attention(*heads)
    mixed.float().sum().backward()
    assert len(calls) == before


def test_checkpointing_changes_nothing(calls):
    heads = heads_of(140)
    again = checkpoint(causal_attention, *heads, use_reentrant=False)
    assert isinstance(again, Tensor)
    found, wanted = (torch.autograd.grad(y.float().sum(), heads) for y in (again, causal_attention(*heads)))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_position_does_not_see_later_ones_whatever_they_are(value, fast):
    heads = heads_of(140)
    with torch.no_grad():
        heads[1][:, :, 100] = value
    assert causal_attention(*heads)[:, :100].isfinite().all()


@pytest.mark.parametrize("length", [64, 300])
@pytest.mark.parametrize("size", [1, 3])
def test_errors_are_those_of_torch(length, size, fast):
    heads = heads_of(length, size)
    grad = torch.randn(2, length, 3, 20, generator=torch.Generator().manual_seed(1)).bfloat16()
    at_once = scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    own = causal_attention(*heads)
    of_each = ((y, *torch.autograd.grad(y, heads, grad)) for y in (own, at_once))
    for found, torchs, wanted in zip(*of_each, exact(heads, grad), strict=True):
        assert error(found, wanted) < 1.6 * error(torchs, wanted)


def test_formulas_in_float64():
    generator = torch.Generator().manual_seed(0)
    query, *others = (
        torch.randn(2, length, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for length in (3, 5, 5)
    )
    # The weights are an output too: second derivatives go through them.
    both = bfloat16_attention._Attention.apply
    assert torch.autograd.gradcheck(both, (query, *others), atol=1e-6)
    assert torch.autograd.gradgradcheck(both, (query, *others), atol=1e-6)
