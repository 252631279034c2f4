"""Masks of square tiles with as many active connections in every row and column, compiled."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import native
from rarefy.kernels.instruction_sets import extension
from rarefy.kernels.selection import check_candidates, prepared

# Two bytes name a place in a tile.
_LONGEST_SIDE = 256
# Up to this side a kernel compares all masks of a tile, of which there are as many at most.
_MOST_TRIED = 4
_MOST_OPTIONS = 90


class Tiles(NamedTuple):
    """What `keep_regular` keeps of each square tile.

    Args:
        side: of a tile.
        kept: active connections of each row and column, 0 < kept < side.
        options: all such masks up to a side of 4, bool [options, side · side]; None above.
        start: of the order that decides between equal sums, as `TieOrder.start` says it.
        places: of the entries, numbered tile by tile, in that order; None as they are numbered.
    """

    side: int
    kept: int
    options: Tensor | None
    start: int
    places: Tensor | None


def takes_tiles(scores: Tensor, side: int) -> bool:
    """Whether `keep_regular` is compiled for scores in tiles of this side: float32 or less, on the CPU.

    Example:
        >>> takes_tiles(torch.zeros(4, 4, dtype=torch.float64), 4)
        False
    """
    return side <= _LONGEST_SIDE and prepared(scores[:0])[1] and native.has("keep_regular")


def keep_regular(
    scores: Tensor, tiles: Tiles, marked: Tensor | None = None, fill: float = 0.0, by_size: bool = False
) -> Tensor:
    """The mask that `patterns.tiles.keep_regular_in` makes, of scores that `takes_tiles` takes.

    Args:
        scores: [rows, columns].
        tiles: what each of them keeps.
        marked: bool, shape of `scores`, where `fill` stands for the score; None for nowhere.
        fill: that score.
        by_size: whether scores count without their signs.

    Returns:
        Bool of the shape of `scores`.

    Raises:
        RarefyError: the tiles do not fit the scores, or what is marked does not.

    Example:
        >>> tiles = Tiles(2, 1, torch.tensor([[True, False, False, True], [False, True, True, False]]), 0, None)
        >>> scores = torch.tensor([[9.0, 8.0], [7.0, 1.0]])
        >>> kept = torch.tensor([[False, True], [True, False]])
        >>> torch.equal(keep_regular(scores, tiles) if takes_tiles(scores, 2) else kept, kept)
        True
    """
    _check_tiles(scores, tiles)
    check_candidates(scores, marked, "marked")
    scores, _ = prepared(scores)
    # Names keep these alive while their addresses are in use.
    marks = None if marked is None else marked.contiguous()
    options = None if tiles.options is None else tiles.options.contiguous()
    places = None if tiles.places is None else tiles.places.long().contiguous()
    mask = torch.empty(scores.shape, dtype=torch.bool, device="cpu")
    module: Any = extension()
    module.keep_regular(
        isa=native.index_for(scores),
        scores=scores.data_ptr(),
        by_size=by_size,
        marked=_address(marks),
        fill=fill,
        rows=scores.shape[0],
        columns=scores.shape[1],
        side=tiles.side,
        count=tiles.kept,
        options=_address(options),
        option_count=0 if options is None else len(options),
        start=tiles.start,
        places=_address(places),
        mask=mask.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return mask


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _check_tiles(scores: Tensor, tiles: Tiles) -> None:
    side, count, options, _, places = tiles
    shape = tuple(scores.shape)
    if not 0 < count < side or scores.dim() != 2 or any(size % side for size in shape):
        given = f"side {side} with count {count} and shape {shape}"
        raise RarefyError(
            f"tiles: {given} is not allowed; give a side that divides both dimensions and 0 < count < side"
        )
    if (side <= _MOST_TRIED) != (options is not None):
        given = "None" if options is None else "a tensor"
        allowed = f"all masks of a tile up to a side of {_MOST_TRIED}, None above"
        raise RarefyError(f"options: {given} for a side of {side} is not allowed; give {allowed}")
    if options is not None and not _are_masks(options, side * side):
        given = f"{options.dtype} with shape {tuple(options.shape)}"
        raise RarefyError(f"options: {given} is not allowed; give bool masks, each of {side * side} entries")
    if places is not None and places.numel() != scores.numel():
        raise RarefyError(
            f"places: {places.numel()} are not allowed; give one for each of {scores.numel()} scores"
        )


def _are_masks(options: Tensor, size: int) -> bool:
    return options.dtype == torch.bool and options.shape[1:] == (size,) and 0 < len(options) <= _MOST_OPTIONS
