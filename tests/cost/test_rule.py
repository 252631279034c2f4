import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rarefy.cost import calibration
from rarefy.cost import rule as rules
from rarefy.cost.calibration import BreakEven, kernels_in_use
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
    sparsity = break_even_sparsity(8192, 4096, tokens, dtype)
    assert 0 < sparsity < 1
    assert pays_off(8192, 4096, tokens, 1 - sparsity - 1e-6, dtype)
    assert not pays_off(8192, 4096, tokens, 1 - sparsity + 1e-6, dtype)


# ---- processors and blocks ----


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes the rule take this machine for another with AVX-512."""

    def pretend(name: str, unit: str) -> None:
        units = ("v4_bf16", unit) if unit == "v4_amx" else ("v4_bf16",)
        monkeypatch.setattr(rules, "available", lambda: ("reference", "v3", "v4"))
        monkeypatch.setattr(rules, "instruction_set", lambda: "v4")
        monkeypatch.setattr(rules, "processor", lambda: name)
        monkeypatch.setattr(rules, "matrix_units", lambda: units)
        monkeypatch.setattr("rarefy.cost.calibration.instruction_set", lambda: "v4")
        monkeypatch.setattr("rarefy.cost.calibration.matrix_unit", lambda: unit)

    return pretend


LAYER = (768, 768, 2048)


def test_blocks_pay_where_single_connections_do_not(on: Callable[[str, str], None]) -> None:
    on("AMD EPYC", "v4_bf16")
    assert pays_off(*LAYER, 0.4, torch.bfloat16, (32, 32)) and not pays_off(*LAYER, 0.4, torch.bfloat16)
    assert pays_off(*LAYER, 0.25, torch.bfloat16, (8, 16)) and not pays_off(
        *LAYER, 0.4, torch.bfloat16, (8, 16)
    )
    assert break_even_sparsity(*LAYER, torch.bfloat16, (16, 16)) < break_even_sparsity(*LAYER, torch.bfloat16)
    # a block that no kernel takes is stored by connections
    assert relative_time(*LAYER, 0.1, block=(4, 4)) == relative_time(*LAYER, 0.1)


def test_dense_products_are_faster_on_another_make(on: Callable[[str, str], None]) -> None:
    on("AMD EPYC", "v4_bf16")
    here = break_even_sparsity(*LAYER)
    on("Intel(R) Xeon(R)", "")
    assert break_even_sparsity(*LAYER) > here


def test_a_matrix_unit_leaves_single_connections_hardly_a_chance(on: Callable[[str, str], None]) -> None:
    on("Intel(R) Xeon(R)", "v4_amx")
    assert not pays_off(*LAYER, 0.1, torch.bfloat16) and pays_off(*LAYER, 0.05, torch.bfloat16)
    assert not pays_off(*LAYER, 0.1, torch.bfloat16, (8, 8))
    assert pays_off(*LAYER, 0.2, torch.bfloat16, (32, 32)) and not pays_off(
        *LAYER, 0.5, torch.bfloat16, (32, 32)
    )
    assert pays_off(*LAYER, 0.3, torch.float32) and pays_off(*LAYER, 0.4, torch.float32, (16, 16))


def test_what_was_not_measured_is_not_taken_before_it_is_calibrated(
    on: Callable[[str, str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(calibration.VARIABLE, str(tmp_path))
    on("Intel(R) Xeon(R)", "")
    case = (*LAYER, 0.01, torch.bfloat16, (8, 32))
    assert relative_time(*case) == math.inf and kernels_in_use(*case[4:]) == "v4 blocks of 8"
    calibration.save({calibration.key_of(*case[4:]): BreakEven(0.5, 8, 5e6)})
    assert pays_off(*case) and not pays_off(*LAYER, 0.3, torch.bfloat16)


def test_a_dense_layer_of_few_tokens_is_busy_with_its_weight(on: Callable[[str, str], None]) -> None:
    on("Intel(R) Xeon(R)", "v4_amx")
    thresholds = [break_even_sparsity(2048, 2048, tokens, torch.bfloat16) for tokens in (8, 64, 512, 2048)]
    assert thresholds == sorted(thresholds) and thresholds[0] < 0.8 and thresholds[-1] > 0.9


def test_costs_of_the_dense_layer_are_divided_by() -> None:
    plain = BreakEven(0.5, 8, 4e6)
    both = BreakEven(0.5, 8, 4e6, dense_offset=64, dense_overhead=2e6)
    dense = 1 + 64 / 128 + 2e6 / (512 * 256 * 128)
    assert both.relative_time(512, 256, 128, 0.1) == pytest.approx(
        plain.relative_time(512, 256, 128, 0.1) / dense
    )
    assert both.with_threads(2) == BreakEven(0.5, 8, 8e6, dense_offset=64, dense_overhead=4e6)
