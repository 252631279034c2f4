"""Attention in bfloat16 that keeps its weights: as exact as torch's, used for training alone."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from rarefy.models import attention, bfloat16_attention
from rarefy.models.attention import causal_attention


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
    """A processor that has the instructions, whether it has or not."""
    monkeypatch.setattr(bfloat16_attention, "is_fast", lambda: True)


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


@pytest.mark.parametrize("samples, heads", [(0, 3), (2, 0)])
def test_nothing_to_attend_to(samples, heads, fast):
    empty = torch.zeros(samples, heads, 64, 8, dtype=torch.bfloat16, requires_grad=True)
    mixed = causal_attention(empty, empty, empty)
    assert mixed.shape == (samples, 64, heads, 8)
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
        assert bfloat16_attention.is_fast.__wrapped__() is wanted


def test_transforms(fast):
    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return bfloat16_attention.attend(query, key, value).float().square().sum()

    heads = [tensor.detach().double().transpose(0, 1) for tensor in heads_of(70)]
    each = torch.func.vmap(torch.func.grad(loss, argnums=(0, 1, 2)))(*heads)
    for number in range(3):
        alone = torch.func.grad(loss, argnums=(0, 1, 2))(*(tensor[number] for tensor in heads))
        for found, wanted in zip(each, alone, strict=True):
            torch.testing.assert_close(found[number], wanted)


def test_formulas_in_float64():
    generator = torch.Generator().manual_seed(0)
    query, *others = (
        torch.randn(2, length, 4, dtype=torch.float64, generator=generator, requires_grad=True)
        for length in (3, 5, 5)
    )
    # The weights are an output too: second derivatives go through them.
    both = bfloat16_attention._Attention.apply
    assert torch.autograd.gradcheck(both, (query, *others), atol=1e-4)
    assert torch.autograd.gradgradcheck(both, (query, *others), atol=1e-4)
