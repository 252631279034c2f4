"""Every operation in plain torch: the oracle of the tests, and the path for machines and types without a kernel.

The dense matrix is built and its zeros are multiplied. Half-precision types accumulate in float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SAMPLED_FROM = 1 << 16
_SAMPLES = 1 << 14
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def build(
    mask: Tensor, width: int, transposed_width: int, active: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The five index tensors of `Panels` for a bool mask [rows, columns] with `active` connections.

    Example:
        >>> build(torch.tensor([[True, False], [True, True]]), 2, 2, 3)[0]
        tensor([0, 1, 3], dtype=torch.int32)
    """
    rows, columns = mask.shape
    row, column = mask.nonzero().unbind(1)
    # Both sorts are stable: `nonzero` is in row-major order, and stays so within a panel.
    first = (column // width).argsort(stable=True)
    row = row[first]
    column = column[first]
    order = ((row // transposed_width) * columns + column).argsort(stable=True)
    return (
        _starts(column // width * rows + row, _panels(columns, width) * rows),
        _offsets(column, width),
        _starts(row // transposed_width * columns + column, _panels(rows, transposed_width) * columns),
        _offsets(row[order], transposed_width),
        order.to(torch.int32),
    )


def positions(rows: int, columns: int, width: int, starts: Tensor, offsets: Tensor) -> Tensor:
    """int64 [connections]: row-major position of each connection.

    Example:
        >>> positions(2, 2, 2, torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1], dtype=torch.int16))
        tensor([0, 2, 3])
    """
    counts = starts.diff()
    run = torch.repeat_interleave(
        torch.arange(counts.numel(), device=starts.device), counts, output_size=offsets.numel()
    )
    # The bits of a uint16 again.
    column = (offsets.long() & 0xFFFF) + run // max(rows, 1) * width
    return run % max(rows, 1) * columns + column


def sources(size: int, positions: Tensor, previous: Tensor) -> Tensor:
    """int32: the place of each position among the `previous` ones, −1 where it is new; positions are below `size`.

    Example:
        >>> sources(3, torch.tensor([1, 2]), torch.tensor([0, 1]))
        tensor([ 1, -1], dtype=torch.int32)
    """
    # Half of int64, and as wide as the matrix; there are fewer than 2³¹ connections.
    place = torch.full((size,), -1, dtype=torch.int32, device=positions.device)
    place[previous] = torch.arange(previous.numel(), dtype=torch.int32, device=place.device)
    return place[positions]


def dense(rows: int, columns: int, positions: Tensor, values: Tensor) -> Tensor:
    """The matrix [rows, columns] with `values` at `positions`.

    Example:
        >>> dense(1, 3, torch.tensor([1]), torch.tensor([5.0]))
        tensor([[0., 5., 0.]])
    """
    flat = torch.zeros(rows * columns, dtype=values.dtype, device=values.device)
    return flat.index_put((positions,), values).view(rows, columns)


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """X · weightᵀ + bias in the dtype of x.

    Example:
        >>> forward(torch.ones(1, 2), torch.tensor([[1.0, 2.0]]), None)
        tensor([[3.]])
    """
    wide = _wide(x.dtype)
    return F.linear(x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)).to(x.dtype)


def backward(grad: Tensor, x: Tensor, weight: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, of the weights at `positions` and of the bias, from grad [tokens, out] and x [tokens, in].

    Returns:
        grad · weight in the dtype of x; gradᵀ · x at the positions and the column sums of grad in the dtype of weight.

    Example:
        >>> grads = backward(torch.ones(2, 1), torch.ones(2, 2), torch.tensor([[3.0, 0.0]]), torch.tensor([0]))
        >>> [g.tolist() for g in grads]
        [[[3.0, 0.0], [3.0, 0.0]], [2.0], [2.0]]
    """
    wide = _wide(x.dtype)
    grad = grad.to(wide)
    full = weight.to(wide)
    grad_values = (grad.t() @ x.to(wide)).reshape(-1)[positions]
    return (grad @ full).to(x.dtype), grad_values.to(weight.dtype), grad.sum(0).to(weight.dtype)


def keep_top(scores: Tensor, count: int, candidates: Tensor | None = None) -> Tensor:
    """The mask of the `count` highest scores among the candidates; ties go to the lowest index, NaN ranks last.

    Example:
        >>> keep_top(torch.tensor([1.0, float("nan"), 1.0, 0.0]), 1)
        tensor([ True, False, False, False])
    """
    flat = scores.detach().reshape(-1)
    among = torch.ones_like(flat, dtype=torch.bool) if candidates is None else candidates.reshape(-1)
    ranked = among & ~flat.isnan()
    total = int(ranked.count_nonzero())
    # NaN only where there are not enough numbers.
    if count >= total:
        return (ranked | _first(among & ~ranked, count - total)).view(scores.shape)
    if count <= 0:
        return torch.zeros_like(among).view(scores.shape)
    threshold = _kth_largest(flat, ranked, count, total)
    mask = (flat > threshold) & ranked
    ties = (flat == threshold) & ranked
    return (mask | _first(ties, count - int(mask.count_nonzero()))).view(scores.shape)


def keep_in_groups(scores: Tensor, counts: Tensor, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mask of the highest scores among the candidates of each row, and which rows cut a tie.

    Example:
        >>> keep_in_groups(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([0, 1, 1, 1, 1]))
        (tensor([[False,  True, False, False]]), tensor([True]))
    """
    among = torch.ones_like(scores, dtype=torch.bool) if candidates is None else candidates
    wanted = counts.long()[among.sum(1)][:, None]
    # Negated and rising, since a descending sort would put NaN first; then what may not be kept behind all else.
    by_score = (-scores).argsort(dim=1, stable=True)
    kind = torch.where(among, scores.isnan().byte(), 2)
    places = by_score.gather(1, kind.gather(1, by_score).argsort(dim=1, stable=True))
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(places)
    mask = among & (torch.empty_like(places).scatter_(1, places, ranks) < wanted)
    return mask, _are_cut(scores, mask, among & ~mask)


def _are_cut(scores: Tensor, inside: Tensor, outside: Tensor) -> Tensor:
    """Whether the lowest score inside is one of those outside, for each row; NaN is the lowest and equals NaN."""
    lowest = torch.where(inside, scores, torch.inf).amin(1, keepdim=True)
    equal = torch.where(lowest.isnan(), scores.isnan(), scores == lowest)
    return inside.any(1) & (equal & outside).any(1)


def move(entries: Tensor, sources: Tensor) -> Tensor:
    """The entries at their new places; zero where a source is −1.

    Example:
        >>> move(torch.tensor([5.0, 7.0]), torch.tensor([1, -1, 0]))
        tensor([7., 0., 5.])
    """
    # A zero in front, which is the place −1 of a new connection.
    padded = torch.cat([entries.new_zeros(1), entries])
    return padded.index_select(0, sources + 1)


def block_sums(scores: Tensor, block_rows: int, block_columns: int) -> Tensor:
    """Sums over blocks [block_rows, block_columns] of a matrix.

    Example:
        >>> block_sums(torch.ones(2, 4), 2, 2)
        tensor([[4., 4.]])
    """
    rows, columns = scores.shape
    tiles = scores.detach().reshape(rows // block_rows, block_rows, columns // block_columns, block_columns)
    return tiles.sum((1, 3))


def zero_inactive_(tensor: Tensor, mask: Tensor) -> None:
    """Replaces inactive positions by zeros, in place; a NaN there vanishes.

    The bits are multiplied by 0 or 1 as integers, which is a selection and twice as fast as `masked_fill_` on a CPU.

    Example:
        >>> tensor = torch.tensor([1.0, float("nan")])
        >>> zero_inactive_(tensor, torch.tensor([True, False]))
        >>> tensor
        tensor([1., 0.])
    """
    integer = _INTEGER_OF_SIZE.get(tensor.element_size())
    if integer is None or not tensor.is_floating_point():
        tensor.masked_fill_(~mask, 0)
    else:
        # Detached, since nobody may write to a leaf that wants a gradient.
        tensor.detach().view(integer).mul_(mask)


def holds_zeros(data: Tensor, mask: Tensor) -> bool:
    """Whether every inactive position is a zero.

    Example:
        >>> holds_zeros(torch.tensor([1.0, -0.0]), torch.tensor([True, False]))
        True
    """
    return not bool(data.masked_fill(mask, 0).any())


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _panels(columns: int, width: int) -> int:
    return max(1, -(-columns // width))


def _starts(keys: Tensor, size: int) -> Tensor:
    starts = torch.zeros(size + 1, dtype=torch.int32, device=keys.device)
    starts[1:] = torch.bincount(keys, minlength=size).cumsum(0)
    return starts


def _offsets(column: Tensor, width: int) -> Tensor:
    offset = column % width
    # The bits of a uint16, for which torch has hardly any operation.
    return torch.where(offset < 1 << 15, offset, offset - (1 << 16)).to(torch.int16)


def _kth_largest(scores: Tensor, ranked: Tensor, k: int, total: int) -> Tensor:
    """The k-th largest of the ranked scores: bracketed by a sample, then searched for in the bracket only."""
    if total >= _SAMPLED_FROM:
        low, high = _bracket(scores, ranked, k / total)
        above = int(((scores > high) & ranked).sum())
        inside = scores[(scores >= low) & (scores <= high) & ranked]
        if above < k <= above + inside.numel():
            # `kthvalue` counts from the lowest.
            return inside.kthvalue(inside.numel() - (k - above) + 1).values
    values = scores[ranked]
    return values.kthvalue(total - k + 1).values


def _bracket(scores: Tensor, ranked: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """Two sampled scores that most probably enclose the one with `share` of the ranked scores above it."""
    stride = max(1, scores.numel() // _SAMPLES)
    sample = scores[::stride][ranked[::stride]].sort(descending=True).values
    rank = share * sample.numel()
    # Six standard deviations of the rank in the sample; a bracket that misses is noticed, and costs time only.
    margin = 6.0 * (sample.numel() * share * (1 - share)) ** 0.5 + 2
    infinity = scores.new_tensor(float("inf"))
    low = sample[round(rank + margin)] if rank + margin < sample.numel() - 1 else -infinity
    high = sample[round(rank - margin)] if rank - margin > 0 else infinity
    return low, high


def _first(mask: Tensor, count: int) -> Tensor:
    """The first `count` active positions of a 1-D mask."""
    first = torch.zeros_like(mask)
    if count > 0:
        first[mask.nonzero().squeeze(1)[:count]] = True
    return first
