"""A sparse weight and its mask in dense form, for the time of an update."""

from __future__ import annotations

from functools import cached_property

from torch import Tensor

from rarefy.masks import zero_inactive_
from rarefy.storage.parameter import SparseParameter
from rarefy.torch_private import times_written


class DenseForm:
    """Weight and mask in the shape of the dense weight: each built once in an update, and only if it is asked for.

    Compact storage builds both from indices, which takes longer than choosing among them.

    Args:
        parameter: the weight.
        in_pieces: whether as the DTensors that it is cut in.
    """

    def __init__(self, parameter: SparseParameter, in_pieces: bool = False) -> None:
        self._parameter = parameter
        self._in_pieces = in_pieces
        self._version = 0

    @cached_property
    def weight(self) -> Tensor:
        """The dense weight with exact zeros, without gradient; not to be written to."""
        parameter = self._parameter
        weight = parameter.weight.detach() if self._in_pieces else parameter.dense_weight()
        self._version = times_written(weight)
        return weight

    @cached_property
    def mask(self) -> Tensor:
        """Bool, True = active; not to be written to."""
        return self._parameter.mask_in_pieces if self._in_pieces else self._parameter.mask

    def forget(self) -> None:
        """Frees both; they are built anew where they are asked for."""
        vars(self).pop("weight", None)
        vars(self).pop("mask", None)

    def follow(self, mask: Tensor) -> None:
        """Called once the weight has another mask, and nobody has written to it since it was shown here."""
        known: Tensor | None = vars(self).pop("weight", None)
        vars(self)["mask"] = mask
        # Of other storages it is the weight itself, or it has to be gathered anew; and what an algorithm wrote to a
        # copy has not reached the weight.
        is_copy = self._parameter.storage.kind == "compact"
        if known is not None and is_copy and times_written(known) == self._version:
            # What was grown is zero in the weight, and was zero here before.
            vars(self)["weight"] = zero_inactive_(known, mask)
