"""From scores to masks: pure functions of tensors, exact and deterministic.

A mask is a bool tensor, True = active. A score ranks connections: higher = keep or grow, NaN ranks below everything.
Equal scores are told apart by a seeded order of their places, so that a layer of equal weights is not left with its
first rows alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rarefy import kernels
from rarefy.distributed import Cut, highest, is_cut, local_part
from rarefy.errors import RarefyError
from rarefy.ties import DEFAULT_ORDER, TieOrder, settle, settle_rows

# From the number of candidates of a row, or of each row, to how many of them are kept.
_Counts = Callable[[Tensor], Tensor]


def kept_count(total: int, sparsity: float) -> int:
    """How many of `total` connections are active: round((1 − sparsity)·total), ties to even.

    Args:
        total: number of connections, ≥ 0.
        sparsity: fraction of inactive ones, in [0, 1].

    Example:
        >>> kept_count(100, 0.8), kept_count(5, 0.5)
        (20, 2)
    """
    return round((1.0 - sparsity) * total)


def all_active(like: Tensor) -> Tensor:
    """The mask of a dense weight, whole also where `like` is cut in pieces.

    Example:
        >>> all_active(torch.zeros(2)).tolist()
        [True, True]
    """
    return torch.ones(like.shape, dtype=torch.bool, device=like.device)


def keep_top(scores: Tensor, count: int, order: TieOrder = DEFAULT_ORDER) -> Tensor:
    """Mask of the `count` highest scores.

    Args:
        scores: any shape, floating point.
        count: how many to keep; clamped to [0, scores.numel()].
        order: decides among equal scores.

    Returns:
        Bool tensor of the shape of `scores` with exactly `count` active connections.

    Example:
        >>> keep_top(torch.tensor([0.2, 0.9, float("nan"), 0.9, 0.1]), 2).int()
        tensor([0, 1, 0, 1, 0], dtype=torch.int32)
    """
    return _top(scores, None, count, order)


def drop_lowest(mask: Tensor, scores: Tensor, count: int, order: TieOrder = DEFAULT_ORDER) -> Tensor:
    """Drops the `count` active connections with the lowest scores.

    Args:
        mask: bool, the active connections.
        scores: shape of `mask`; those of inactive connections are ignored.
        count: how many to drop; clamped to the number of active ones.
        order: decides among equal scores.

    Returns:
        A new mask, a subset of `mask`.

    Example:
        >>> drop_lowest(torch.tensor([True, True, False]), torch.tensor([3.0, 1.0, 9.0]), 1).tolist()
        [True, False, False]
    """
    return _top(scores, mask, active_count(mask) - count, order)


def grow_highest(mask: Tensor, scores: Tensor, count: int, order: TieOrder = DEFAULT_ORDER) -> Tensor:
    """Adds the `count` inactive connections with the highest scores.

    Args:
        mask: bool, the active connections.
        scores: shape of `mask`; those of active connections are ignored.
        count: how many to grow; clamped to the number of inactive ones.
        order: decides among equal scores.

    Returns:
        A new mask, a superset of `mask`.

    Example:
        >>> grow_highest(torch.tensor([True, False, False]), torch.tensor([9.0, 1.0, 2.0]), 1).tolist()
        [True, False, True]
    """
    return mask | _top(scores, ~mask, count, order)


def keep_top_in_rows(scores: Tensor, count: int, order: TieOrder = DEFAULT_ORDER) -> Tensor:
    """Mask of the `count` highest scores of every row.

    Args:
        scores: [rows, columns], floating point.
        count: how many to keep in each row; clamped to [0, columns].
        order: decides among equal scores.

    Returns:
        Bool tensor of the shape of `scores`.

    Example:
        >>> keep_top_in_rows(torch.tensor([[3.0, 1.0, 2.0], [1.0, 4.0, 5.0]]), 2).int().tolist()
        [[1, 0, 1], [0, 1, 1]]
    """
    return _top_in_rows(scores, None, lambda candidates: torch.full_like(candidates, count), order)


def drop_and_grow(
    mask: Tensor,
    drop_scores: Tensor,
    grow_scores: Tensor,
    count: int,
    fraction: float,
    order: TieOrder = DEFAULT_ORDER,
) -> Tensor:
    """Drops a share of the active connections of every row, then grows others until `count` are active.

    Of a active connections a − round(fraction·a) stay, at most `count`: those of highest drop score. A row that is
    all active goes to `count` by drop score alone. What was dropped may grow again.

    Args:
        mask: bool [rows, columns], the active connections.
        drop_scores: shape of `mask`; those of inactive connections are ignored.
        grow_scores: shape of `mask`; those of connections that stay are ignored.
        count: active connections of each row afterwards; clamped to [0, columns].
        fraction: share that is dropped, in [0, 1].
        order: decides among equal drop scores; among equal grow scores `order.other()`.

    Returns:
        A new mask.

    Example:
        >>> mask, weight = torch.tensor([[True, True, False, False]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> drop_and_grow(mask, weight, torch.tensor([[0.0, 0.0, 1.0, 2.0]]), 2, 0.5).int()
        tensor([[0, 1, 0, 1]], dtype=torch.int32)
    """
    kept = drop_in_rows(mask, drop_scores, count, fraction, order)
    most = count - mask.shape[1]
    # A row grows what it lacks: `count` less what it kept, and it kept all but the candidates.
    return kept | _top_in_rows(grow_scores, ~kept, lambda candidates: candidates + most, order.other())


def drop_in_rows(
    mask: Tensor, scores: Tensor, count: int, fraction: float, order: TieOrder = DEFAULT_ORDER
) -> Tensor:
    """The first half of `drop_and_grow`: what stays of every row.

    Args:
        mask: bool [rows, columns].
        scores: of the active connections; the lowest of each row are dropped.
        count: active connections of a row afterwards, so that no more than these stay.
        fraction: share of a row's active connections that is dropped, in [0, 1].
        order: decides among equal scores.

    Example:
        >>> mask, weight = torch.tensor([[True, True, False, False]]), torch.tensor([[1.0, 2.0, 0.0, 0.0]])
        >>> drop_in_rows(mask, weight, 2, 0.5).int()
        tensor([[0, 1, 0, 0]], dtype=torch.int32)
    """

    def staying(active: Tensor) -> Tensor:
        # In double: float32 skips whole numbers above 2^24.
        stay = (active - (fraction * active.double()).round().long()).clamp(max=count)
        # A full row has nothing else to grow: what it drops beyond the target would only come back, by another score.
        return stay.masked_fill(active == mask.shape[1], count)

    return _top_in_rows(scores, mask, staying, order)


def active_count(mask: Tensor) -> int:
    """How many connections are active, in all pieces of a mask that is cut.

    Example:
        >>> active_count(torch.tensor([True, False]))
        1
    """
    own = local_part(mask).count_nonzero()
    return int(Cut.of(mask).sum(own)) if is_cut(mask) else int(own)


def drop_and_grow_in_pieces(
    mask: Tensor, drop_scores: Tensor, grow_scores: Tensor, count: int, fraction: float, order: TieOrder
) -> Tensor:
    """What `drop_and_grow` makes of a weight in one row, for one that is cut in pieces.

    Args:
        mask: bool, a DTensor.
        drop_scores: a DTensor like the mask.
        grow_scores: a DTensor like the mask.
        count: active connections afterwards.
        fraction: share that is dropped, in [0, 1].
        order: as for `drop_and_grow`.
    """
    kept, stay = drop_in_pieces(mask, drop_scores, count, fraction, order)
    return kept | _top(grow_scores, ~kept, count - stay, order.other())


def drop_in_pieces(
    mask: Tensor, scores: Tensor, count: int, fraction: float, order: TieOrder
) -> tuple[Tensor, int]:
    """The first half of `drop_and_grow_in_pieces`: what stays, and how many connections that is.

    Args:
        mask: bool, whole or a DTensor.
        scores: like the mask; the lowest of active connections are dropped.
        count: active connections afterwards, so that no more than these stay.
        fraction: share that is dropped, in [0, 1].
        order: decides among equal scores.

    Example:
        >>> mask, weight = torch.tensor([True, True, False]), torch.tensor([1.0, 2.0, 0.0])
        >>> drop_in_pieces(mask, weight, 2, 0.5, DEFAULT_ORDER)
        (tensor([False,  True, False]), 1)
    """
    active = active_count(mask)
    # Half to even, as `drop_in_rows` rounds, so that pieces give the mask of the whole.
    stay = count if active == mask.numel() else min(active - round(fraction * active), count)
    return _top(scores, mask, stay, order), stay


def shares_of_top(scores: Sequence[Tensor], count: int, order: TieOrder = DEFAULT_ORDER) -> list[int]:
    """How many of the `count` highest scores of several tensors are in each of them.

    Args:
        scores: any shapes, floating point; all whole, or all DTensors that are cut over the same processes.
        count: clamped to the number of all scores.
        order: decides among equal scores, by their places in all of them one after the other.

    Example:
        >>> shares_of_top([torch.tensor([3.0, 4.0]), torch.tensor([1.0, 2.0])], 3)
        [2, 1]
    """
    if not scores or not is_cut(scores[0]):
        # On one device: layers may be on several.
        rows = [one.reshape(-1).cpu() for one in scores]
        kept = keep_top(torch.cat(rows), count, order) if rows else torch.empty(0)
        return [int(part.count_nonzero()) for part in kept.split([len(row) for row in rows])]
    cuts = [Cut.of(one) for one in scores]
    rows = [local_part(one).reshape(-1) for one in scores]

    def tie_keys(entries: Tensor) -> Tensor:
        return order.keys(_places_in_all(entries, cuts, [len(row) for row in rows]))

    kept = highest.keep_top(torch.cat(rows), None, count, tie_keys, cuts[0].sum)
    own = torch.stack([part.count_nonzero() for part in kept.split([len(row) for row in rows])])
    return cuts[0].sum(own).tolist()


def _places_in_all(entries: Tensor, cuts: Sequence[Cut], lengths: Sequence[int]) -> Tensor:
    """Where entries of pieces in a row stand in the flattened weights in a row."""
    places = torch.empty_like(entries)
    # Two counts: of the entries in this process, and of the places in the whole weights.
    start = 0
    offset = 0
    for cut, length in zip(cuts, lengths, strict=True):
        inside = (entries >= start) & (entries < start + length)
        places[inside] = offset + cut.places(entries[inside] - start)
        start += length
        offset += cut.shape.numel()
    return places


def sparsity_of(mask: Tensor) -> float:
    """The measured fraction of inactive connections; 0 for an empty mask.

    Example:
        >>> sparsity_of(torch.tensor([True, False, False, False]))
        0.75
    """
    return 1.0 - int(mask.count_nonzero()) / mask.numel() if mask.numel() else 0.0


def zero_inactive_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Replaces inactive positions by exact zeros in place; a NaN there vanishes.

    Selected, not multiplied: by a compiled kernel, or by the bits.

    Args:
        tensor: any dtype; changed.
        mask: bool, of the same shape.

    Returns:
        The tensor.

    Example:
        >>> zero_inactive_(torch.tensor([1.5, float("nan")]), torch.tensor([True, False]))
        tensor([1.5000, 0.0000])
    """
    return kernels.zero_inactive_(tensor, mask)


def fill_inactive_(tensor: Tensor, mask: Tensor, number: float) -> Tensor:
    """Puts a number at inactive positions, in place, whatever is there.

    Args:
        tensor: floating point; changed.
        mask: bool, of the same shape.
        number: of the tensor's dtype; infinite ones too.

    Returns:
        The tensor.

    Example:
        >>> fill_inactive_(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), -torch.inf)
        tensor([1., -inf])
    """
    return kernels.fill_inactive_(tensor, mask, number)


def _top_in_rows(scores: Tensor, candidates: Tensor | None, counts: _Counts, order: TieOrder) -> Tensor:
    """The mask of the highest scores of each row, among the candidates or of all."""
    rows, columns = scores.shape
    if not scores.numel():
        return torch.ones_like(scores, dtype=torch.bool)
    if rows == 1:
        among = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
        return _top(scores, candidates, int(counts(among.count_nonzero())), order)
    # One entry for each number of candidates that a row can have: the kernel looks the count of a row up in it.
    table = counts(torch.arange(columns + 1, device=scores.device))
    kept, contested = kernels.keep_in_groups(scores, table, candidates)
    return settle_rows(kept, scores, candidates, contested, order)


def _top(scores: Tensor, candidates: Tensor | None, count: int, order: TieOrder) -> Tensor:
    """The mask of the `count` highest scores among the candidates, or of all.

    Raises:
        RarefyError: they have other shapes, so that entries in a row would not belong together.
    """
    if candidates is not None and candidates.shape != scores.shape:
        raise RarefyError(
            f"scores of shape {list(scores.shape)} for a mask of shape {list(candidates.shape)} are not allowed; give "
            "one score for each connection"
        )
    if is_cut(scores):
        return _top_in_pieces(scores, candidates, count, order)
    # Once, for the selection and for `settle`; nothing is rounded.
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    flat = scores.detach().reshape(-1)
    among = None if candidates is None else candidates.reshape(-1)
    # Settled only where the border may run through equal scores, as that takes further passes over all of them.
    kept, may_cut_a_tie = kernels.keep_top_and_tie(flat, count, among)
    if may_cut_a_tie:
        kept = settle(kept, flat, torch.ones_like(kept) if among is None else among, order)
    return kept.view(scores.shape)


def _top_in_pieces(scores: Tensor, candidates: Tensor | None, count: int, order: TieOrder) -> Tensor:
    """The same for a DTensor, without gathering it."""
    cut = Cut.of(scores)
    among = None if candidates is None else local_part(candidates)

    def tie_keys(entries: Tensor) -> Tensor:
        return order.keys(cut.places(entries))

    return cut.wrap(highest.keep_top(local_part(scores), among, count, tie_keys, cut.sum))
