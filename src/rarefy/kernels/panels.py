"""The topology of a sparse matrix, by rows and by columns; README.md in this directory describes the layout."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import native, reference
from rarefy.kernels.instruction_sets import instruction_set, instruction_set_index, on_intel
from rarefy.kernels.native import Layout

# Places are int32: half the memory that the kernels read beside the values.
_MOST_CONNECTIONS = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Panels:
    """Where the active connections of a matrix [rows, columns] are, and where those of its transpose are.

    Columns are cut in panels; connections are ordered by panel, then row, then column. Values are kept in this order
    by whoever owns them. The transpose is a structure of the same form, with `order` leading from its connections to
    their values.

    Args:
        rows, columns: shape of the matrix.
        width, transposed_width: columns (of the transpose: rows) per panel, at most 65536.
        starts: int32 [panels · rows + 1], first connection of each row in each panel.
        offsets: int16 [connections], the bits of an unsigned column number within its panel.
        transposed_starts, transposed_offsets: the same for the transpose.
        order: int32 [connections], place among the values of each connection of the transpose.
        half: whether products of activations in bfloat16 or float16 are computed with tiles in float16, where the
            processor has instructions for it.
    """

    rows: int
    columns: int
    width: int
    transposed_width: int
    starts: Tensor
    offsets: Tensor
    transposed_starts: Tensor
    transposed_offsets: Tensor
    order: Tensor
    half: bool = False

    @classmethod
    def from_mask(cls, mask: Tensor) -> Panels:
        """The structure of a mask.

        Args:
            mask: bool [rows, columns] on any device, fewer than 2³¹ active connections.

        Raises:
            RarefyError: the mask has another dtype or number of dimensions, or too many active connections.

        Example:
            >>> Panels.from_mask(torch.tensor([[True, False], [True, True]])).positions()
            tensor([0, 2, 3])
        """
        if mask.dtype != torch.bool or mask.dim() != 2:
            raise RarefyError(
                f"mask: {mask.dtype} with shape {tuple(mask.shape)} is not allowed; give a bool matrix"
            )
        rows, columns = mask.shape
        active = int(mask.count_nonzero())
        if active > _MOST_CONNECTIONS:
            raise RarefyError(
                f"mask: {active} active connections are not allowed; give fewer than 2**31 (a sparser layer)"
            )
        density = active / max(1, mask.numel())
        widths = panel_widths(rows, columns, density)
        build = (
            reference.build if instruction_set_index() is None or mask.device.type != "cpu" else native.build
        )
        return cls(rows, columns, *widths, *build(mask.contiguous(), *widths, active))

    @property
    def nonzeros(self) -> int:
        """Number of active connections."""
        return self.offsets.numel()

    @property
    def density(self) -> float:
        """Share of active connections; 0 for an empty matrix."""
        return self.nonzeros / (self.rows * self.columns) if self.rows * self.columns else 0.0

    @property
    def layout(self) -> Layout:
        """The connections by rows of the matrix, as the kernels of the forward pass take them."""
        return Layout(self.rows, self.columns, self.width, self.starts, self.offsets)

    @property
    def back_layout(self) -> Layout:
        """The connections by columns of the matrix, as the kernels of the backward pass take them."""
        return Layout(
            self.columns, self.rows, self.transposed_width, self.transposed_starts, self.transposed_offsets
        )

    @property
    def sizes(self) -> list[int]:
        """The four whole numbers, in the order in which the operations take them."""
        return [self.rows, self.columns, self.width, self.transposed_width]

    @property
    def arguments(self) -> list[int]:
        """The whole numbers that the operations take: `sizes`, and 1 for `half`."""
        return [*self.sizes, 1] if self.half else self.sizes

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five index tensors, in the order in which the operations take them."""
        return self.starts, self.offsets, self.transposed_starts, self.transposed_offsets, self.order

    def positions(self) -> Tensor:
        """int64 [connections]: position row · columns + column of each connection, in the order of the values.

        Example:
            >>> Panels.from_mask(torch.eye(3, dtype=torch.bool)).positions()
            tensor([0, 4, 8])
        """
        if _compiled(self.offsets):
            return native.positions(self.layout)
        return reference.positions(*self.layout)

    def mask(self) -> Tensor:
        """The mask, bool [rows, columns].

        Example:
            >>> Panels.from_mask(torch.tensor([[True, False]])).mask()
            tensor([[ True, False]])
        """
        # One byte each, which the kernel scatters like values of four.
        return self.dense(torch.ones_like(self.offsets, dtype=torch.bool))

    def dense(self, values: Tensor) -> Tensor:
        """The matrix [rows, columns] with `values` at the active connections and zeros elsewhere; differentiable.

        Example:
            >>> Panels.from_mask(torch.tensor([[True, False], [True, True]])).dense(torch.tensor([1.0, 2.0, 3.0]))
            tensor([[1., 0.],
                    [2., 3.]])
        """
        # Values that want a gradient are watched, and take the second way.
        if values.element_size() in (1, 4) and _compiled(self.offsets, values):
            return native.scatter(self.layout, values.contiguous())
        return reference.dense(self.rows, self.columns, self.positions(), values)

    def gather(self, matrix: Tensor) -> Tensor:
        """The entries of a dense matrix [rows, columns] at the active connections, in the order of the values.

        Example:
            >>> panels = Panels.from_mask(torch.tensor([[True, False], [True, True]]))
            >>> panels.gather(torch.tensor([[1.0, 9.0], [2.0, 3.0]]))
            tensor([1., 2., 3.])
        """
        if matrix.element_size() in (1, 4) and _compiled(self.offsets, matrix):
            return native.gather(self.layout, matrix.contiguous())
        return matrix.reshape(-1)[self.positions()]

    def sources_in(self, previous: Panels) -> Tensor:
        """int32 [connections]: the place of each connection among the values of `previous`, −1 where it is new.

        Example:
            >>> old, new = torch.tensor([[True, True, False]]), torch.tensor([[False, True, True]])
            >>> Panels.from_mask(new).sources_in(Panels.from_mask(old))
            tensor([ 1, -1], dtype=torch.int32)
        """
        if not _compiled(self.offsets, previous.offsets):
            return reference.sources(self.rows * self.columns, self.positions(), previous.positions())
        return native.sources(self.layout, previous.layout)

    # ---- products ----

    def linear(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """X · Wᵀ + bias as an operation; sizes and dtypes fit together already."""
        return torch.ops.rarefy.sparse_linear(x, values, bias, None, *self.tensors, self.arguments)

    def gradients(
        self, grad: Tensor, x: Tensor, values: Tensor, needs: list[bool]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of x, values and bias; those that are not needed are of any content."""
        operation = torch.ops.rarefy.sparse_linear_backward
        return operation(grad, x, values, *self.tensors, self.arguments, needs)


def _compiled(*tensors: Tensor) -> bool:
    """Whether the compiled kernels are in use and may read these tensors."""
    on_cpu = all(t.is_cpu for t in tensors)
    return on_cpu and instruction_set_index() is not None and native.unwatched(*tensors)


def panel_widths(rows: int, columns: int, density: float) -> tuple[int, int]:
    """Columns per panel of W and of Wᵀ, as measured for the instruction set in use.

    With 512-bit vectors, 20 connections per row and panel in the forward pass and 40 in the backward pass. Shorter
    vectors hold twice as many tokens in the forward pass, whose panels are kept within the first-level cache, and half
    as many in the backward pass, which gains from longer rows. On Intel's processors with 512-bit vectors a narrower
    panel pays in the forward pass where few connections are active.

    Example:
        >>> panel_widths(4096, 64, 0.1)[1] in (400, 768)
        True
    """
    # An empty matrix has a density of 0, and needs widths too.
    wanted = 1 / max(density, 1e-6)
    if instruction_set() == "v3":
        return panel_width(columns, 20 * wanted, 128, 192), panel_width(rows, 80 * wanted, 384, 768)
    most = 256 if on_intel() else 384
    return panel_width(columns, 20 * wanted, 96, most), panel_width(rows, 40 * wanted, 192, 768)


def panel_width(columns: int, wanted: float, least: int, most: int) -> int:
    """Columns per panel: about `wanted` within [least, most], a multiple of 16, or all where little would be cut off.

    Example:
        >>> panel_width(768, 200, 96, 384), panel_width(256, 200, 96, 384)
        (192, 256)
    """
    width = int(min(max(wanted, least), most)) // 16 * 16
    return max(1, columns if width >= 0.7 * columns else width)
