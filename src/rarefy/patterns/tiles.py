"""Square tiles of scores → masks with as many active connections in every row and in every column of a tile."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.ties import TieOrder

# Up to this side all masks of a tile are tried: 90 of them for two of four.
MOST_TRIED = 4
# With 90 masks a tile, their sums in double take 47 MB.
_TILES_AT_ONCE = 1 << 16
_WORDS_AT_ONCE = 1 << 17


def to_tiles(matrix: Tensor, side: int) -> Tensor:
    """A row for each square tile of a matrix, the tiles by row.

    Example:
        >>> to_tiles(torch.arange(8).view(2, 4), 2).tolist()
        [[0, 1, 4, 5], [2, 3, 6, 7]]
    """
    height, width = (size // side for size in matrix.shape)
    tiles = matrix.reshape(height, side, width, side).transpose(1, 2)
    return tiles.reshape(height * width, side**2)


def from_tiles(tiles: Tensor, side: int, columns: int) -> Tensor:
    """The reverse of `to_tiles`, for a matrix with so many columns."""
    width = columns // side
    return tiles.reshape(len(tiles) // width, width, side, side).transpose(1, 2).reshape(-1, columns)


def fullest_row(mask: Tensor, side: int) -> int:
    """The most connections that are active in a row of a tile of a matrix; 0 for an empty one.

    Example:
        >>> fullest_row(torch.tensor([[True, True, False, True]]), 2)
        2
    """
    if not mask.numel():
        return 0
    word = {4: torch.int32, 8: torch.int64}.get(side)
    if word is not None:
        flat = mask.reshape(-1)
        # torch reads no words from between two of them.
        words = (flat.clone() if flat.storage_offset() % side else flat).view(word)
        # The product adds the bytes of a word up in its highest one, by which the products are then in order.
        ones = 0x0101010101010101 & ((1 << 8 * side) - 1)
        # Little by little: one product of all would take longer to be put into memory than to be computed.
        return max(int((some * ones).amax()) for some in words.split(_WORDS_AT_ONCE)) >> (8 * side - 8)
    # Slice by slice, in bytes where those suffice: torch's sums over a short dimension take a multiple of the time.
    units = mask.to(_counting(side)).reshape(-1, side).unbind(1)
    return int(functools.reduce(torch.add, units).amax())


def fullest_column(mask: Tensor, side: int) -> int:
    """The most connections that are active in a column of a tile of a matrix; 0 for an empty one.

    Example:
        >>> fullest_column(torch.tensor([[True, True], [False, True]]), 2)
        2
    """
    if not mask.numel():
        return 0
    dtype = _counting(side)
    rows, columns = mask.shape
    return int(mask.to(dtype).reshape(rows // side, side, columns).sum(1, dtype=dtype).amax())


def _counting(side: int) -> torch.dtype:
    """In which as many as `side` can be counted."""
    return torch.uint8 if side < 256 else torch.int32


def keep_regular_in(
    matrix: Tensor,
    side: int,
    count: int,
    order: TieOrder,
    marked: Tensor | None = None,
    fill: float = 0.0,
    by_size: bool = False,
) -> Tensor:
    """The mask that `keep_regular` makes of the tiles of a matrix; compiled for float32 and less on the CPU.

    Args:
        matrix: scores [rows, columns], which the side divides; floating point.
        side: of a tile.
        count: active connections of each row and column of a tile; clamped to [0, side].
        order: decides among masks of equal sums; entries are numbered tile by tile.
        marked: bool, shape of `matrix`, where another number stands for the score; None for nowhere.
        fill: that number.
        by_size: whether the score is what the matrix has without its sign, which the kernel leaves out as it reads.

    Returns:
        Bool, shape of `matrix`, in memory of its own.

    Example:
        >>> scores = torch.tensor([[9.0, 1.0], [1.0, 9.0]])
        >>> keep_regular_in(scores, 2, 1, TieOrder(), scores > 8, -1.0).int().tolist()
        [[0, 1], [1, 0]]
    """
    if not matrix.numel() or not 0 < count < side:
        # Nothing to rank; contiguous, whatever the scores are.
        return torch.full(matrix.shape, count >= side, dtype=torch.bool, device=matrix.device)
    if kernels.takes_tiles(matrix, side):
        options = regular_masks(side, count) if side <= MOST_TRIED else None
        tiles = kernels.Tiles(side, count, options, order.start, order.places)
        return kernels.keep_regular(matrix, tiles, marked, fill, by_size)
    scores = matrix.abs() if by_size else matrix
    scores = scores if marked is None else scores.masked_fill(marked, fill)
    return from_tiles(keep_regular(to_tiles(scores, side), side, count, order), side, matrix.shape[1])


def keep_regular(scores: Tensor, side: int, count: int, order: TieOrder) -> Tensor:
    """Mask of `count` connections in every row and column of each tile, with the highest sum of scores.

    Up to a side of 4 the best of all masks. Above it the highest scores are taken one after the other, as long as row
    and column have room, which gives at least half of the best sum of scores ≥ 0 (Hubara et al., arXiv:2102.08124);
    rows and columns that were left with fewer are then filled by exchanges.

    Infinite scores outrank every sum: as many of +∞ and as few of -∞ as can be; NaN ranks below -∞.

    Args:
        scores: [tiles, side · side], floating point.
        side: of a tile.
        count: active connections of each row and column; clamped to [0, side].
        order: decides among masks of equal sums.

    Returns:
        Bool tensor of the shape of `scores`.

    Example:
        >>> scores = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
        >>> keep_regular(scores, 2, 1, TieOrder()).int().tolist()
        [[0, 1, 1, 0]]
    """
    if count <= 0 or count >= side or not len(scores):
        return torch.full_like(scores, count >= side, dtype=torch.bool)
    options = regular_masks(side, count).to(scores.device) if side <= MOST_TRIED else None
    chosen = []
    for start in range(0, len(scores), _TILES_AT_ONCE):
        # In double, in which the sums of a tile hardly round.
        some = scores.detach()[start : start + _TILES_AT_ONCE].double()
        tiles = torch.arange(start, start + len(some), device=scores.device)
        if options is None:
            chosen.append(_greedy(some, _keys(order, tiles, side), side, count))
        else:
            chosen.append(_best(some, tiles, options, order))
    return torch.cat(chosen)


def _keys(order: TieOrder, tiles: Tensor, side: int) -> Tensor:
    """The keys of all places of some tiles, [tiles, side · side]."""
    size = side * side
    return order.keys(tiles[:, None] * size + torch.arange(size, device=tiles.device))


def regular_masks(side: int, count: int) -> Tensor:
    """All masks of a tile with `count` active connections in every row and column, on the CPU.

    Returns:
        Bool [masks, side · side].

    Example:
        >>> [len(regular_masks(4, count)) for count in (1, 2, 3)]
        [24, 90, 24]
    """
    kinds = [row for row in itertools.product((False, True), repeat=side) if sum(row) == count]
    # Not on the default device of whoever calls: a kernel reads them by their address.
    rows = torch.tensor(kinds, device="cpu")
    choices = torch.cartesian_prod(*[torch.arange(len(rows), device="cpu")] * side)
    tiles = rows[choices]
    return tiles[(tiles.sum(1) == count).all(1)].flatten(1)


def _best(scores: Tensor, tiles: Tensor, options: Tensor, order: TieOrder) -> Tensor:
    """The option with the highest sum for each tile."""
    is_finite = scores.isfinite()
    if is_finite.all():
        totals = _sums(scores, options)
    else:
        # Small whole numbers, which float32 adds up exactly.
        ranks = _ranks_of_infinities(scores) @ options.float().T
        totals = _sums(scores.masked_fill(~is_finite, 0.0), options)
        totals = totals.masked_fill_(ranks < ranks.amax(1, keepdim=True), -torch.inf)
    best, choice = totals.max(1, keepdim=True)
    # Without it, is there another as good?
    is_open = (totals.scatter(1, choice, -torch.inf).amax(1) == best[:, 0]).nonzero().squeeze(1)
    choice = choice.squeeze(1)
    if len(is_open):
        tied = totals[is_open] == best[is_open]
        # The lowest keys win, as everywhere; their sum is another random number for each option.
        side = round(scores.shape[1] ** 0.5)
        sums = _sums(-_keys(order, tiles[is_open], side).double(), options)
        choice[is_open] = sums.masked_fill(~tied, -torch.inf).argmax(1)
    return options[choice]


def _sums(numbers: Tensor, options: Tensor) -> Tensor:
    """The sum of what each option keeps of each tile, added in the order of places: so all devices round alike."""
    # Every option keeps as many.
    places = options.nonzero()[:, 1].view(len(options), -1)
    by_place = numbers.T.contiguous()
    total = by_place[places[:, 0]]
    for more in places.T[1:]:
        total += by_place[more]
    return total.T


def _ranks_of_infinities(scores: Tensor) -> Tensor:
    """Small whole numbers: one +∞ outweighs all that a tile can have of -∞, as one NaN does."""
    size = scores.shape[1] + 1
    ranks = (scores == torch.inf).float() * size * size - (scores == -torch.inf).float()
    return ranks - scores.isnan().float() * size


def _greedy(scores: Tensor, keys: Tensor, side: int, count: int) -> Tensor:
    """The highest scores that fit, one after the other, then exchanges."""
    by_key = keys.argsort(1)
    ranked = (-scores).gather(1, by_key).argsort(dim=1, stable=True)  # NaN last
    sequence = by_key.gather(1, ranked)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    in_rows = torch.zeros(len(scores), side, dtype=torch.long, device=scores.device)
    in_columns = torch.zeros_like(in_rows)
    for place in sequence.T.unsqueeze(2):
        row = place // side
        column = place % side
        fits = (in_rows.gather(1, row) < count) & (in_columns.gather(1, column) < count)
        kept.scatter_(1, place, fits)
        in_rows.scatter_add_(1, row, fits.long())
        in_columns.scatter_add_(1, column, fits.long())
    return _completed(kept.view(-1, side, side), scores.view(-1, side, side), count).flatten(1)


def _completed(kept: Tensor, scores: Tensor, count: int) -> Tensor:
    """Rows and columns with fewer than `count` filled up.

    Where row r and column c have room, (r, c) itself is active, or greedy selection would have taken it. One active
    (x, y) gives way to (r, y) and (x, c): the counts of x and y stay. Of all that can, the one that costs least does.
    """
    # As numbers, since differences of infinities would be NaN; the lowest is what was NaN.
    finite = scores.nan_to_num(-1e200, 1e100, -1e100)
    while len(tiles := (kept.sum(2) < count).any(1).nonzero().squeeze(1)):
        mask = kept[tiles]
        each = torch.arange(len(tiles), device=kept.device)
        row = (mask.sum(2) < count).byte().argmax(1)
        column = (mask.sum(1) < count).byte().argmax(1)
        to_row = mask[each, row][:, None, :]
        to_column = mask[each, :, column][:, :, None]
        gain = (
            finite[tiles][each, row][:, None, :] + finite[tiles][each, :, column][:, :, None] - finite[tiles]
        )
        gain = gain.masked_fill(~mask | to_row | to_column, -torch.inf)
        x, y = (axis for axis in torch.unravel_index(gain.flatten(1).argmax(1), gain.shape[1:]))
        kept[tiles, x, y] = False
        kept[tiles, row, y] = True
        kept[tiles, x, column] = True
    return kept
