"""The structure that a mask must obey: pieces of a weight, and what each of them looks like inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rarefy.errors import ConfigError
from rarefy.patterns.constant_fan import FanIn, FanOut
from rarefy.patterns.diagonals import Diagonals
from rarefy.patterns.structures import BLOCK_SCORES, FREE, Blocks, NOfM, Structure
from rarefy.patterns.transposable import Transposable
from rarefy.roles import OUT_IN, Axes
from rarefy.validation import shorten


@dataclass(frozen=True)
class Pattern:
    """Independent pieces of a weight, each of which keeps its own count of connections in a structure.

    A weight is [out, in, …]; `axis` 0 makes groups of output rows, 1 groups of input columns. The pieces of a weight
    that its module holds as [in, out, …] are turned around, so that a structure finds the outputs in dimension 0.

    Args:
        axis: the dimension that is cut in groups; None leaves the weight whole.
        groups: how many equal groups; ≥ 1.
        structure: how connections are chosen inside a piece.
        axes: how the module reads the weight's dimensions.

    Example:
        >>> [piece.shape for piece in Pattern(axis=0, groups=2).split(torch.zeros(4, 3))]
        [torch.Size([2, 3]), torch.Size([2, 3])]
        >>> print(Pattern(axis=0, groups=2, structure=NOfM(2, 4)))
        balance_out_groups: 2, {n: 2, m: 4}
    """

    axis: int | None = None
    groups: int = 1
    structure: Structure = FREE
    axes: Axes = OUT_IN

    def __str__(self) -> str:
        balance = f"{self.key}: {self.groups}" if self.key else ""
        inside = str(self.structure) if self.structure != FREE or not balance else ""
        return ", ".join(part for part in (balance, inside) if part)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """The pieces of `tensor`, as views, in order."""
        turned = self._turned(tensor)
        return (turned,) if self.axis is None else turned.chunk(self.groups, dim=self.axis)

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        whole = pieces[0] if self.axis is None else torch.cat(list(pieces), dim=self.axis)
        # Turned back it is a view, and kernels read masks in the order of memory.
        return self._turned(whole).contiguous()

    def on(self, axes: Axes) -> Pattern:
        """The same pattern for a weight whose module reads its dimensions in this way.

        Example:
            >>> turned = Pattern(axis=0, groups=2).on(Axes(transposed=True))
            >>> [piece.shape for piece in turned.split(torch.zeros(3, 4))]
            [torch.Size([2, 3]), torch.Size([2, 3])]
        """
        return replace(self, axes=axes)

    @property
    def _is_turned(self) -> bool:
        return self.axes.transposed and (self.axis is not None or self.structure != FREE)

    @property
    def outputs(self) -> int:
        """The dimension of a piece that has the outputs.

        Example:
            >>> Pattern().on(Axes(transposed=True)).outputs, Pattern(axis=0).on(Axes(transposed=True)).outputs
            (1, 0)
        """
        return 1 if self.axes.transposed and not self._is_turned else 0

    def _turned(self, tensor: Tensor) -> Tensor:
        """[out, in, …] from a weight [in, out, …], and the reverse."""
        return tensor.transpose(0, 1) if self._is_turned else tensor

    def kept(self, shape: Sequence[int], sparsity: float) -> int:
        """How many connections of a weight are active at a sparsity, exactly; at least one of each piece.

        Example:
            >>> Pattern(axis=0, groups=2).kept((4, 5), 0.75)
            4
        """
        piece = self._piece(self._oriented(shape))
        return self.groups * self.structure.kept(piece, self.within_reach(shape, sparsity))

    def within_reach(self, shape: Sequence[int], sparsity: float) -> float:
        """The sparsity, lowered where rounding would leave a weight, or a group of it, without any connection.

        Args:
            shape: of the weight.
            sparsity: that is asked for; 1 means no connections and stays.

        Example:
            >>> Pattern().within_reach((1, 16), 0.98), Pattern().within_reach((16, 16), 0.98)
            (0.9375, 0.98)
        """
        return self.structure.within_reach(self._piece(self._oriented(shape)), sparsity)

    @property
    def key(self) -> str:
        """The name of the option that asks for the groups; empty for whole weights."""
        return {None: "", 0: "balance_out_groups", 1: "balance_in_groups"}[self.axis]

    @property
    def block(self) -> tuple[int, int] | None:
        """Outputs and inputs of the blocks that are active as a whole; None without any.

        Example:
            >>> Pattern(structure=Blocks(8, 16)).block
            (8, 16)
        """
        structure = self.structure
        return (structure.rows, structure.columns) if isinstance(structure, Blocks) else None

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight that the pattern does not divide.

        Raises:
            ConfigError: a dimension is missing, or not a multiple of groups, m or block.
        """
        if self.axis is not None or self.structure != FREE:
            self._check_axes(name, shape)
        if self.axis is None:
            self.structure.check(name, self._oriented(shape))
            return
        shape = self._oriented(shape)
        if len(shape) <= self.axis or shape[self.axis] % self.groups:
            size = shape[self.axis] if len(shape) > self.axis else 0
            side = "output" if self.axis == 0 else "input"
            raise ConfigError(
                self.key, self.groups, f"a divisor of the {size} {side} features of {name} {list(shape)}"
            )
        self.structure.check(f"each group of {name}", self._piece(self._oriented(shape)))

    def _check_axes(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight in whose dimensions outputs and inputs cannot be told apart."""
        given = str(self)
        allowed = "unstructured connections for this weight, or a param_filter that leaves it out"
        if self.axes.unknown:
            raise ConfigError(self.key or "pattern", f"{given} for {name} ({self.axes.unknown})", allowed)
        convolution_groups = self.axes.groups
        if convolution_groups == 1:
            return
        # A convolution with groups has several sets of inputs (of outputs, where it is transposed) in one dimension.
        split_axis = 0 if self.axes.transposed else 1
        if split_axis in (self.axis, self.structure.counted_axis):
            side = "outputs" if self.axes.transposed else "inputs"
            problem = f"its {convolution_groups} groups see different {side}"
            key = self.key if self.axis == split_axis else "pattern"
            raise ConfigError(key, f"{given} for {name} ({problem})", allowed)
        if isinstance(self.structure, Diagonals):
            problem = f"a diagonal would cross its {convolution_groups} groups"
            raise ConfigError("pattern", f"{given} for {name} ({problem})", allowed)
        share = [size // convolution_groups if axis == 0 else size for axis, size in enumerate(shape)]
        if self.structure != FREE:
            self.structure.check(f"each of the {convolution_groups} groups of {name}", self._oriented(share))

    def _oriented(self, shape: Sequence[int]) -> list[int]:
        return [shape[1], shape[0], *shape[2:]] if self._is_turned and len(shape) > 1 else list(shape)

    def _piece(self, shape: Sequence[int]) -> list[int]:
        """The shape of a piece of an oriented shape."""
        return [size // self.groups if axis == self.axis else size for axis, size in enumerate(shape)]


_NAMED: Mapping[str, Structure] = {
    "unstructured": FREE,
    "fan_in": FanIn(),
    "fan_out": FanOut(),
    "diagonal": Diagonals(),
}


def parse_pattern(pattern: object, balance_in_groups: object, balance_out_groups: object) -> Pattern:
    """The pattern that three options of the `sparsity:` block describe.

    Args:
        pattern: `unstructured`, `fan_in`, `fan_out`, `diagonal`, `{n: 2, m: 4}`, with `transposable: true` or without,
            or `{block: [8, 8]}`, with a `score` or without.
        balance_in_groups: number of input groups, ≥ 1, or None.
        balance_out_groups: number of output groups, ≥ 1, or None.

    Raises:
        ConfigError: an unknown pattern, a bad number, or both balances at once.

    Example:
        >>> parse_pattern({"n": 2, "m": 4}, None, None).structure
        NOfM(n=2, m=4)
    """
    structure = _parse_structure(pattern)
    if balance_in_groups is not None and balance_out_groups is not None:
        raise ConfigError("balance_in_groups", "together with balance_out_groups", "only one of the two")
    for axis, key, groups in (
        (1, "balance_in_groups", balance_in_groups),
        (0, "balance_out_groups", balance_out_groups),
    ):
        if groups is not None:
            return Pattern(axis, _checked_groups(key, groups), structure)
    return Pattern(structure=structure)


def _parse_structure(pattern: object) -> Structure:
    if isinstance(pattern, str) and pattern in _NAMED:
        return _NAMED[pattern]
    if isinstance(pattern, Mapping) and {"n", "m"} <= set(pattern) <= {"n", "m", "transposable"}:
        return _n_of_m(pattern["n"], pattern["m"], pattern.get("transposable", False))
    if isinstance(pattern, Mapping) and "block" in pattern and set(pattern) <= {"block", "score"}:
        return _blocks(pattern["block"], pattern.get("score", "sum"))
    raise ConfigError(
        "pattern",
        shorten(pattern),
        "unstructured, {n: 2, m: 4}, {block: [8, 8]}, fan_in, fan_out or diagonal",
        "pattern: {n: 2, m: 4}",
    )


def _n_of_m(n: object, m: object, transposable: object) -> NOfM:
    kept = _count(n)
    size = _count(m)
    if not 0 < kept < size:
        what = "whole numbers 1 ≤ n < m: n of every m inputs are active"
        raise ConfigError("pattern", shorten({"n": n, "m": m}), what, "pattern: {n: 2, m: 4}")
    if not isinstance(transposable, bool):
        example = "pattern: {n: 2, m: 4, transposable: true}"
        raise ConfigError("pattern.transposable", shorten(transposable), "true or false", example)
    return Transposable(kept, size) if transposable else NOfM(kept, size)


def _blocks(block: object, score: object) -> Blocks:
    sizes = [_count(size) for size in block] if isinstance(block, list | tuple) else []
    if len(sizes) != 2 or not all(sizes):
        what = "two whole numbers ≥ 1, the outputs and inputs of a block"
        raise ConfigError("pattern.block", shorten(block), what, "pattern: {block: [8, 8]}")
    if score not in list(BLOCK_SCORES):  # a list, because what was written may not be hashable
        example = "pattern: {block: [8, 8], score: norm}"
        raise ConfigError("pattern.score", shorten(score), " or ".join(BLOCK_SCORES), example)
    return Blocks(sizes[0], sizes[1], str(score))


def _checked_groups(key: str, groups: object) -> int:
    if not _count(groups):
        raise ConfigError(key, shorten(groups), "a whole number of groups ≥ 1", f"{key}: 12")
    return _count(groups)


def _count(value: object) -> int:
    """A whole number ≥ 1; 0 for anything else."""
    return max(value, 0) if isinstance(value, int) and not isinstance(value, bool) else 0
