"""Attention in blocks of queries against attention at once."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.decoder.attention import causal_attention, prefixes


@pytest.mark.parametrize("length", [0, 1, 256, 257, 300, 384, 767, 768])
def test_attention_in_blocks_is_causal_attention(length):
    heads = [torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    whole = nn.functional.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2)
    blocks = causal_attention(*heads)
    torch.testing.assert_close(blocks, whole)
    weights = torch.randn_like(whole)
    for found, wanted in zip(
        torch.autograd.grad((blocks * weights).sum(), heads),
        torch.autograd.grad((whole * weights).sum(), heads),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted)


def heads_of(length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 1, length, 3, dtype=torch.float64, generator=generator)


def test_gradients_of_prefixes_are_those_of_slices():
    tensor, ends = heads_of(7).requires_grad_(), (2, 5, 7)
    weights = [heads_of(end, seed=end) for end in ends]
    found = sum((part * weight).sum() for part, weight in zip(prefixes(tensor, ends), weights, strict=True))
    wanted = sum((tensor[:, :, :end] * weight).sum() for end, weight in zip(ends, weights, strict=True))
    assert isinstance(found, Tensor) and isinstance(wanted, Tensor)
    torch.testing.assert_close(
        *(torch.autograd.grad(total, tensor)[0] for total in (found, wanted)), rtol=0, atol=1e-15
    )


def test_a_prefix_that_is_not_used():
    tensor = heads_of(4).requires_grad_()
    prefixes(tensor, (1, 4))[0].sum().backward()
    assert tensor.grad is not None
    assert torch.equal(tensor.grad[:, :, 0], torch.ones(2, 1, 3, dtype=torch.float64))
    assert not tensor.grad[:, :, 1:].any()


def test_gradients_are_not_written_to():
    tensor, kept = heads_of(3).requires_grad_(), torch.ones(2, 1, 3, 3, dtype=torch.float64)
    short, long = prefixes(tensor, (2, 3))
    torch.autograd.backward([short, long], [kept[:, :, :2], kept])
    assert torch.equal(kept, torch.ones_like(kept))


def test_second_derivatives():
    tensor = heads_of(4).requires_grad_()
    torch.autograd.gradgradcheck(lambda t: tuple(part**3 for part in prefixes(t, (1, 4))), tensor)


@pytest.mark.filterwarnings("ignore:.torch.jit")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing():
    heads = heads_of(300).float()
    traced = torch.jit.trace(lambda h: causal_attention(h, h, h), heads)
    torch.testing.assert_close(traced(2 * heads), causal_attention(2 * heads, 2 * heads, 2 * heads))


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_forward_mode_differentiation():
    heads, tangent = heads_of(300), heads_of(300, 1)
    with sdpa_kernel(SDPBackend.MATH):
        _, found = torch.func.jvp(lambda h: causal_attention(h, h, h), (heads,), (tangent,))
        _, wanted = torch.func.jvp(
            lambda h: nn.functional.scaled_dot_product_attention(h, h, h, is_causal=True),
            (heads,),
            (tangent,),
        )
    torch.testing.assert_close(found, wanted.transpose(1, 2))


def test_only_one_gradient_is_batched():
    heads = heads_of(4)
    whole = torch.func.jacrev(lambda h: prefixes(h, (1, 4))[0])(heads)
    assert torch.equal(whole, torch.func.jacrev(lambda h: h[:, :, :1])(heads))


def test_transforms():
    def loss(heads: Tensor) -> Tensor:
        return sum(((part**2).sum() for part in prefixes(heads, (1, 4))), torch.zeros(()))

    many = torch.stack([heads_of(4, seed) for seed in range(3)])
    each = torch.func.vmap(torch.func.grad(loss))(many)
    for heads, found in zip(many, each, strict=True):
        torch.testing.assert_close(
            found, 2 * heads + torch.cat([2 * heads[:, :, :1], 0 * heads[:, :, 1:]], 2)
        )
