"""The short way of a product where no gradient is wanted, for both layouts of the weight."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from rarefy.kernels import instruction_set
from rarefy.kernels.instruction_sets import REFERENCE
from rarefy.tensors import SparseWeight, products


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

    def long_way(*_: object) -> None:
        raise AssertionError("the long way")

    monkeypatch.setattr(products, "_check", long_way)
    with torch.no_grad():
        found = torch.addmm(bias, x, weight) if is_transposed else F.linear(x, weight, bias)
        torch.testing.assert_close(found, expected)
        if is_transposed:
            torch.testing.assert_close(x @ weight, x @ dense)
