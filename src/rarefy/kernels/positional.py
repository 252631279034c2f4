"""An extension that was built before its arguments had names, as an editable install has it until it is built again."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple


class PositionalLayout(NamedTuple):
    """The five numbers that such an extension takes for a layout."""

    rows: int
    columns: int
    width: int
    starts: int
    offsets: int


class PositionalExtension(ModuleType):
    """Such an extension, called by name. Its functions take their arguments in the order in which they are given.

    Args:
        module: the extension.
    """

    def __init__(self, module: ModuleType) -> None:
        super().__init__(module.__name__)
        self._module = module
        self.instruction_sets = module.instruction_sets

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._module, name)
        return lambda **arguments: function(*flattened(arguments))

    def Layout(self, *, connections: int, **numbers: int) -> PositionalLayout:  # noqa: N802
        """A layout; nothing is checked."""
        return PositionalLayout(**numbers)

    def panels_from_mask(self, *, connections: int, threads: int, **arguments: int) -> None:
        """The layout of a mask, in two calls."""
        *counted, offsets = arguments.values()
        self._module.panels_count(*counted, threads)
        self._module.panels_fill(*counted, offsets, threads)

    def panels_sources(
        self, *, panels: PositionalLayout, previous: PositionalLayout, sources: int, threads: int
    ) -> None:
        """Where connections were; rows and columns are given once."""
        self._module.panels_sources(*panels, *previous[2:], sources, threads)


def flattened(arguments: dict[str, Any]) -> list[int]:
    """The arguments as a row of integers.

    Example:
        >>> flattened({"a": 1, "panels": PositionalLayout(2, 3, 4, 5, 6), "threads": 7})
        [1, 2, 3, 4, 5, 6, 7]
    """
    row: list[int] = []
    for value in arguments.values():
        row += value if isinstance(value, PositionalLayout) else [value]
    return row
