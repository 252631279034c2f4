"""The structure that a mask must obey: connections chosen freely, or within balanced groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.errors import ConfigError
from rarefy.validation import shorten


@dataclass(frozen=True)
class Pattern:
    """Independent pieces of a weight, each of which keeps its own count of connections.

    A weight is [out, in, …]; `axis` 0 makes groups of output rows, 1 groups of input columns.

    Args:
        axis: the dimension that is cut in groups; None leaves the weight whole.
        groups: how many equal groups; ≥ 1.

    Example:
        >>> [piece.shape for piece in Pattern(axis=0, groups=2).split(torch.zeros(4, 3))]
        [torch.Size([2, 3]), torch.Size([2, 3])]
    """

    axis: int | None = None
    groups: int = 1

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """The pieces of `tensor`, as views, in order."""
        return (tensor,) if self.axis is None else tensor.chunk(self.groups, dim=self.axis)

    def merge(self, pieces: Sequence[Tensor]) -> Tensor:
        """The inverse of `split`."""
        return pieces[0] if self.axis is None else torch.cat(list(pieces), dim=self.axis)

    @property
    def key(self) -> str:
        """The name of the option that asks for this pattern; empty for whole weights."""
        return {None: "", 0: "balance_out_groups", 1: "balance_in_groups"}[self.axis]

    def check(self, name: str, shape: Sequence[int]) -> None:
        """Refuses a weight that the groups do not divide.

        Raises:
            ConfigError: the dimension is missing or not a multiple of `groups`.
        """
        if self.axis is None:
            return
        if len(shape) <= self.axis or shape[self.axis] % self.groups:
            size = shape[self.axis] if len(shape) > self.axis else 0
            side = "output" if self.axis == 0 else "input"
            raise ConfigError(
                self.key, self.groups, f"a divisor of the {size} {side} features of {name} {list(shape)}"
            )


def parse_pattern(pattern: object, balance_in_groups: object, balance_out_groups: object) -> Pattern:
    """The pattern that three options of the `sparsity:` block describe.

    Args:
        pattern: `unstructured`.
        balance_in_groups: number of input groups, ≥ 1, or None.
        balance_out_groups: number of output groups, ≥ 1, or None.

    Raises:
        ConfigError: an unknown pattern, a bad number, or both balances at once.
    """
    if pattern != "unstructured":
        known = isinstance(pattern, dict) and set(pattern) in ({"n", "m"}, {"block"})
        what = f"{shorten(pattern)} (not available yet)" if known else shorten(pattern)
        raise ConfigError("pattern", what, "unstructured", "pattern: unstructured")
    if balance_in_groups is not None and balance_out_groups is not None:
        raise ConfigError("balance_in_groups", "together with balance_out_groups", "only one of the two")
    for axis, key, groups in (
        (1, "balance_in_groups", balance_in_groups),
        (0, "balance_out_groups", balance_out_groups),
    ):
        if groups is not None:
            return Pattern(axis, _checked_groups(key, groups))
    return Pattern()


def _checked_groups(key: str, groups: object) -> int:
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ConfigError(key, shorten(groups), "a whole number of groups ≥ 1", f"{key}: 12")
    return groups
