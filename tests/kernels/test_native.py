"""The border to the compiled kernels: arguments have names, and what would read past the end of a tensor is refused."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from rarefy.kernels import Panels, native
from rarefy.kernels.instruction_sets import extension, instruction_set_index

pytestmark = pytest.mark.skipif(instruction_set_index() is None, reason="no compiled kernels")

MODULE: Any = extension()
PANELS = Panels.from_mask(torch.tensor([[True, False], [True, True]]))


def layout_arguments(**changed: Any) -> dict[str, Any]:
    layout = PANELS.layout
    arguments = {
        "rows": layout.rows,
        "columns": layout.columns,
        "width": layout.width,
        "starts": layout.starts.data_ptr(),
        "offsets": layout.offsets.data_ptr(),
        "connections": layout.offsets.numel(),
    }
    return arguments | changed


def gather_arguments(matrix: Tensor, values: Tensor) -> dict[str, Any]:
    return {
        "panels": MODULE.Layout(**layout_arguments()),
        "matrix": matrix.data_ptr(),
        "values": values.data_ptr(),
        "element_bytes": 4,
        "threads": 1,
    }


def test_arguments_are_taken_by_name_in_any_order():
    matrix = torch.tensor([[1.0, 9.0], [2.0, 3.0]])
    values = torch.empty(3)
    arguments = gather_arguments(matrix, values)
    MODULE.panels_gather(**dict(reversed(arguments.items())))
    assert values.tolist() == [1.0, 2.0, 3.0]


def test_a_row_of_arguments_and_wrong_names_are_refused():
    arguments = gather_arguments(torch.ones(2, 2), torch.empty(3))
    gather = MODULE.panels_gather
    missing = {name: value for name, value in arguments.items() if name != "values"}
    with pytest.raises(TypeError):
        gather(*arguments.values())
    with pytest.raises(TypeError):
        gather(**missing)
    with pytest.raises(TypeError):
        gather(**missing, value=arguments["values"])
    with pytest.raises(TypeError):
        gather(**arguments | {"panels": arguments["matrix"]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rows": -1}, "rows, columns"),
        ({"width": 0}, "from 1 to 65536"),
        ({"width": 1 << 17}, "from 1 to 65536"),
        ({"starts": 0}, "starts: a null address"),
        ({"offsets": 0}, "offsets: a null address"),
        ({"connections": 2}, "do not belong to one matrix"),
        ({"connections": 4}, "do not belong to one matrix"),
    ],
)
def test_a_layout_that_does_not_fit_its_tensors_is_refused(changed: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        MODULE.Layout(**layout_arguments(**changed))


def test_a_wrong_width_of_panels_is_noticed_where_it_changes_their_number():
    panels = Panels.from_mask(torch.ones(1, 3, dtype=torch.bool))
    starts = torch.tensor([0, 3, 7, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="do not belong to one matrix"):
        native.positions(panels.layout._replace(width=2, starts=starts))


def test_two_layouts_of_different_matrices_are_refused():
    other = Panels.from_mask(torch.ones(3, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="the same rows and columns"):
        native.sources(PANELS.layout, other.layout)


def test_room_for_another_number_of_connections_is_refused():
    with pytest.raises(ValueError, match="do not belong to one matrix"):
        native.build(torch.ones(2, 2, dtype=torch.bool), 2, 2, active=3)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("select", {"element_bytes": 3}, "give 2, 4 or 8"),
        ("block_sums", {"block_rows": 0}, "give whole numbers"),
        ("forward", {"element": 2}, "give 0 (float32) or 1 (bfloat16)"),
        ("keep_top", {"isa": 99}, "no such instruction set"),
        ("panels_scatter", {"element_bytes": 2}, "give 1 or 4"),
        ("panels_gather", {"element_bytes": 8}, "give 1 or 4"),
        ("panels_from_mask", {"width": 0}, "from 1 to 65536"),
        ("panels_from_mask", {"starts": 0}, "starts: a null address"),
        ("panels_transpose", {"width": 0}, "from 1 to 65536"),
    ],
)
def test_what_no_kernel_can_do_is_refused(name: str, arguments: dict[str, int], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        getattr(MODULE, name)(**EMPTY[name] | arguments)


def _empty(*names: str, **numbers: Any) -> dict[str, Any]:
    """Arguments of a call that has nothing to do: null addresses and zeros."""
    return dict.fromkeys(names, 0) | numbers | {"threads": 1}


_LAYOUT = MODULE.Layout(**layout_arguments()) if instruction_set_index() is not None else None
EMPTY = {
    "select": _empty("isa", "data", "mask", "fill", "size", "element_bytes"),
    "block_sums": _empty("isa", "scores", "rows", "columns", "sums", block_rows=1, block_columns=1),
    "forward": _empty("isa", "tokens", "values", "x", "bias", "y", "element", weight=_LAYOUT),
    "keep_top": _empty("isa", "scores", "candidates", "size", "count", "mask"),
    "panels_scatter": _empty("values", "matrix", "element_bytes", panels=_LAYOUT),
    "panels_gather": _empty("values", "matrix", "element_bytes", panels=_LAYOUT),
    "panels_from_mask": _empty("mask", "rows", "columns", "offsets", "connections", starts=1, width=1),
    "panels_transpose": _empty("starts", "offsets", "order", panels=_LAYOUT, width=1),
}
