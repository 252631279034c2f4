import math

import pytest
import torch

from rarefy.cost.rule import TABLE, break_even_sparsity, pays_off, relative_time
from rarefy.kernels import instruction_set


def test_every_compiled_kernel_is_in_the_table(isa: str) -> None:
    known = {(isa, dtype) in TABLE for dtype in (torch.float32, torch.bfloat16)}
    assert known == {isa != "reference"}


def test_without_a_kernel_it_never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    assert relative_time(768, 768, 2048, 0.01, torch.float64) == math.inf
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    assert not pays_off(768, 768, 2048, 0.01) and break_even_sparsity(768, 768, 2048) == 1


@pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")
def test_it_pays_for_sparse_layers_with_many_tokens() -> None:
    assert pays_off(768, 768, 2048, 0.05)
    assert not pays_off(768, 768, 2048, 0.9), "too dense"
    assert not pays_off(16, 16, 64, 0.05), "too small"
    assert not pays_off(768, 768, 0, 0.05), "nothing to do"


@pytest.mark.skipif(instruction_set() == "reference", reason="needs the compiled kernels")
@pytest.mark.parametrize("tokens", [4, 64, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_break_even_is_where_it_starts_to_pay(tokens: int, dtype: torch.dtype) -> None:
    sparsity = break_even_sparsity(2048, 1024, tokens, dtype)
    assert 0 < sparsity < 1
    assert pays_off(2048, 1024, tokens, 1 - sparsity - 1e-6, dtype)
    assert not pays_off(2048, 1024, tokens, 1 - sparsity + 1e-6, dtype)
