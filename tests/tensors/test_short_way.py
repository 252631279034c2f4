"""The short ways of a product past torch's dispatcher: without gradients, and of the gradients themselves."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rarefy.kernels import BlockIndex, Panels, instruction_set
from rarefy.kernels.instruction_sets import REFERENCE
from rarefy.tensors import SparseWeight, products


def long_way(*_: object) -> None:
    raise AssertionError("the long way")


@pytest.mark.skipif(instruction_set() == REFERENCE, reason="needs the compiled kernels")
@pytest.mark.parametrize("is_transposed", [False, True])
def test_inference_takes_the_short_way(is_transposed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    dense = torch.randn(16, 24)
    dense[torch.rand(16, 24) < 0.5] = 0
    weight = SparseWeight.from_dense(dense, dense != 0, is_transposed=is_transposed)
    x = torch.randn(3, 16 if is_transposed else 24)
    bias = torch.randn(24 if is_transposed else 16)
    matrix = dense.t() if is_transposed else dense
    expected = F.linear(x, matrix, bias)

    monkeypatch.setattr(products, "_check", long_way)
    with torch.no_grad():
        found = torch.addmm(bias, x, weight) if is_transposed else F.linear(x, weight, bias)
        torch.testing.assert_close(found, expected)
        if is_transposed:
            torch.testing.assert_close(x @ weight, x @ dense)


@pytest.mark.skipif(instruction_set() == REFERENCE, reason="needs the compiled kernels")
@pytest.mark.parametrize("block", [None, (8, 8)])
@pytest.mark.parametrize("is_transposed", [False, True])
def test_gradients_take_the_short_way(
    is_transposed: bool, block: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    mask = (torch.rand(2, 3) < 0.5).repeat_interleave(8, 0).repeat_interleave(8, 1)
    dense = (torch.randn(16, 24) * mask).requires_grad_()
    weight = nn.Parameter(SparseWeight.from_dense(dense, mask, is_transposed=is_transposed, block=block))
    x = torch.randn(2, 3, 16 if is_transposed else 24, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    expected = twin @ dense if is_transposed else F.linear(twin, dense)
    expected.square().sum().backward()
    for index in (Panels, BlockIndex):
        monkeypatch.setattr(index, "gradients", long_way)
    y = x @ weight if is_transposed else F.linear(x, weight)
    y.square().sum().backward()
    assert weight.grad is not None and dense.grad is not None
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(weight.grad.dense(), dense.grad * mask)
