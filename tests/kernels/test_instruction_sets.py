import importlib
import re
import sys

import pytest
import torch

from rarefy import torch_private as torch_modes
from rarefy.errors import RarefyError
from rarefy.kernels import instruction_sets as dispatch
from rarefy.kernels import native


def forget() -> None:
    dispatch.extension.cache_clear()
    dispatch._compiled.cache_clear()
    dispatch._chosen.cache_clear()
    dispatch.matrix_units.cache_clear()


def test_the_newest_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAREFY_KERNELS", raising=False)
    assert dispatch.instruction_set() == dispatch.available()[-1]


def test_every_available_name_can_be_chosen(isa: str) -> None:
    assert dispatch.instruction_set() == isa
    assert (dispatch.instruction_set_index() is None) == (isa == "reference")


def test_an_instruction_set_that_is_asked_for_comes_without_a_matrix_unit(isa: str) -> None:
    assert dispatch.matrix_unit() == ""


@pytest.mark.parametrize("unit", ["v4_bf16", "v4_amx"])
def test_a_matrix_unit_comes_with_the_newest_instruction_set(
    unit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if unit not in dispatch.matrix_units():
        pytest.skip(f"this machine does not have {unit}")
    monkeypatch.setenv("RAREFY_KERNELS", unit)
    assert (dispatch.instruction_set(), dispatch.matrix_unit()) == ("v4", unit)


def test_a_matrix_unit_that_is_missing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forget()
    try:
        monkeypatch.setattr(dispatch, "matrix_units", lambda: ())
        monkeypatch.setenv("RAREFY_KERNELS", "v4_amx")
        with pytest.raises(RarefyError, match="RAREFY_KERNELS: v4_amx is not available here"):
            dispatch.matrix_unit()
    finally:
        monkeypatch.undo()
        forget()


def test_the_reference_path_asks_for_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are none, that would be a warning, which RAREFY_KERNELS=reference is to silence."""
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    monkeypatch.setattr(dispatch, "extension", lambda: pytest.fail("they were asked for"))
    assert not dispatch.on_intel()


def test_kernels_that_do_not_know_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "instruction_set", lambda: "v4")
    monkeypatch.setattr(dispatch, "extension", lambda: object())
    assert not dispatch.on_intel()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "v9")
    with pytest.raises(RarefyError, match="RAREFY_KERNELS: v9 is not available here; give one of reference"):
        dispatch.instruction_set()


def test_without_the_compiled_kernels_there_is_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name}")

    forget()
    try:
        monkeypatch.setattr(importlib, "import_module", missing)
        monkeypatch.delenv("RAREFY_KERNELS", raising=False)
        with pytest.warns(RuntimeWarning, match="without its compiled kernels") as caught:
            assert [dispatch.instruction_set(), dispatch.instruction_set()] == ["reference", "reference"]
        assert len(caught) == 1
        assert dispatch.remedy(sys.platform) in str(caught[0].message)
        with pytest.raises(RarefyError, match=f"not installed; {re.escape(dispatch.remedy(sys.platform))}$"):
            native._module()
    finally:
        forget()


@pytest.mark.parametrize(("platform", "helps"), [("linux", True), ("freebsd14", True), ("darwin", False)])
def test_a_compiler_is_advised_where_it_helps(platform: str, helps: bool) -> None:
    assert ("compiler" in dispatch.remedy(platform)) == helps
    assert ("macOS" in dispatch.remedy(platform)) == (not helps)


def test_a_private_function_that_torch_lacks_sends_every_call_to_the_dispatcher(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert torch_modes.private("_len_torch_dispatch_stack") is torch._C._len_torch_dispatch_stack
    assert native.unwatched(torch.ones(1))
    monkeypatch.setattr(native, "has_mode", torch_modes.private("_removed_from_torch"))
    assert not native.unwatched(torch.ones(1))
