"""Masks from scores, compiled where that is possible: exact and deterministic, ties to the lowest index, NaN last."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from rarefy.errors import RarefyError
from rarefy.kernels import native, reference


def keep_top(scores: Tensor, count: int, candidates: Tensor | None = None) -> Tensor:
    """The mask of the `count` highest scores.

    Args:
        scores: any shape, floating point, up to 2³¹ elements; compiled for contiguous float32 on the CPU.
        count: how many to keep; clamped to the number of candidates.
        candidates: bool mask of what may be kept; None = everything.

    Returns:
        Bool, the shape of scores.

    Raises:
        RarefyError: the candidates have another shape or dtype than a mask of the scores.

    Example:
        >>> keep_top(torch.tensor([3.0, 1.0, 3.0, float("nan")]), 1)
        tensor([ True, False, False, False])
        >>> keep_top(torch.tensor([3.0, 1.0, 2.0]), 1, candidates=torch.tensor([False, True, True]))
        tensor([False, False,  True])
    """
    return keep_top_and_tie(scores, count, candidates)[0]


def keep_top_and_tie(scores: Tensor, count: int, candidates: Tensor | None = None) -> tuple[Tensor, bool]:
    """The same mask, and whether equal scores may have been told apart by their places.

    The compiled kernel knows it for nothing; plain torch answers True without looking.

    Args:
        scores: as `keep_top` takes them.
        count: as `keep_top` takes it.
        candidates: as `keep_top` takes them.

    Raises:
        RarefyError: as `keep_top` does.

    Example:
        >>> keep_top_and_tie(torch.tensor([3.0, 1.0, 3.0]), 1)
        (tensor([ True, False, False]), True)
    """
    check_candidates(scores, candidates)
    scores, compiled = prepared(scores)
    # The kernel's histogram counts in 32 bits.
    if not compiled or scores.numel() > 2**31:
        return reference.keep_top(scores, count, candidates), True
    return native.keep_top(scores, count, None if candidates is None else candidates.contiguous())


def keep_in_groups(scores: Tensor, counts: Tensor, candidates: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The masks of the highest scores of many rows, and which rows told equal scores apart by their places.

    Args:
        scores: [rows, columns], columns ≥ 1, floating point.
        counts: whole numbers [columns + 1]: how many a row keeps that has so many candidates.
        candidates: bool mask of what may be kept; None = everything.

    Returns:
        Bool of the shape of scores, and bool [rows].

    Raises:
        RarefyError: scores, counts and candidates do not fit together.

    Example:
        >>> keep_in_groups(torch.tensor([[1.0, 3.0, 3.0, 0.0]]), torch.tensor([0, 1, 1, 1, 1]))
        (tensor([[False,  True, False, False]]), tensor([True]))
    """
    _check_groups(scores, counts, candidates)
    scores, compiled = prepared(scores)
    if not compiled or not native.has("keep_in_groups"):
        return reference.keep_in_groups(scores, counts, candidates)
    among = None if candidates is None else candidates.contiguous()
    return native.keep_in_groups(scores, counts.to(torch.int32).contiguous(), among)


def _check_groups(scores: Tensor, counts: Tensor, candidates: Tensor | None) -> None:
    shape = tuple(scores.shape)
    if scores.dim() != 2 or not shape[1]:
        raise RarefyError(f"scores: a shape of {shape} is not allowed; give a matrix with columns")
    if counts.shape != (shape[1] + 1,) or counts.is_floating_point():
        given = f"{counts.dtype} with shape {tuple(counts.shape)}"
        raise RarefyError(f"counts: {given} is not allowed; give {shape[1] + 1} whole numbers")
    check_candidates(scores, candidates)


def check_candidates(scores: Tensor, candidates: Tensor | None, name: str = "candidates") -> None:
    """Refuses what is no mask of the scores.

    Raises:
        RarefyError: it has another shape or dtype; it is called `name` there.
    """
    if candidates is not None and (candidates.dtype != torch.bool or candidates.shape != scores.shape):
        given = f"{candidates.dtype} with shape {tuple(candidates.shape)}"
        raise RarefyError(
            f"{name}: {given} is not allowed; give a bool mask with shape {tuple(scores.shape)}"
        )


def block_sums(scores: Tensor, block: tuple[int, int]) -> Tensor:
    """The sum of the scores of each block of a matrix.

    Args:
        scores: floating point [rows, columns].
        block: rows and columns of a block; each divides its dimension.

    Returns:
        A matrix with one number a block; float32 for half precision.

    Raises:
        RarefyError: the blocks do not divide the matrix.

    Example:
        >>> block_sums(torch.tensor([[1.0, 1.0, 3.0, 0.0]]), (1, 2))
        tensor([[2., 3.]])
    """
    check_blocks(scores, block)
    scores, compiled = prepared(scores)
    return native.block_sums(scores, *block) if compiled else reference.block_sums(scores, *block)


def check_blocks(matrix: Tensor, block: tuple[int, int]) -> None:
    """Refuses blocks that do not divide a matrix.

    Raises:
        RarefyError: they do not, or it is no matrix.
    """
    if matrix.dim() != 2 or min(block) < 1 or matrix.shape[0] % block[0] or matrix.shape[1] % block[1]:
        shape = tuple(matrix.shape)
        raise RarefyError(
            f"block: {tuple(block)} is not allowed for shape {shape}; give sizes that divide rows and columns"
        )


def prepared(scores: Tensor) -> tuple[Tensor, bool]:
    """Contiguous scores, and whether the compiled kernels take them; half precision is widened without loss."""
    scores = scores.detach()
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()
    compiled = scores.dtype == torch.float32 and native.serves(scores)
    return scores.contiguous(), compiled


def fill_inactive_(tensor: Tensor, mask: Tensor, number: float) -> Tensor:
    """Puts a number at inactive positions, in place, whatever is there; compiled where `holds_zeros` is.

    Args:
        tensor: any shape and device, floating point.
        mask: bool, the shape of the tensor.
        number: of the tensor's dtype; infinite ones too.

    Returns:
        The tensor.

    Raises:
        RarefyError: the mask has another shape or dtype.

    Example:
        >>> fill_inactive_(torch.tensor([1.0, 2.0]), torch.tensor([True, False]), -torch.inf)
        tensor([1., -inf])
    """
    check_candidates(tensor, mask, "mask")
    data = tensor.detach()
    if not _is_readable(data, mask):
        data.masked_fill_(~mask, number)
        return tensor
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[data.element_size()]
    bits = int(data.new_full((1,), number).view(word))
    # Without a sign, as the kernel takes them.
    native.fill_inactive_(data, mask, bits % 2**64)
    increment_version(tensor)
    return tensor


def holds_zeros(data: Tensor, mask: Tensor) -> bool:
    """Whether every inactive position is a zero, of either sign; nothing is written.

    Args:
        data: any shape, floating point; compiled where it is contiguous, on the CPU, and of 2, 4 or 8 bytes.
        mask: bool, the shape of `data`.

    Example:
        >>> holds_zeros(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
        False
    """
    data = data.detach()
    return native.holds_zeros(data, mask) if _is_readable(data, mask) else reference.holds_zeros(data, mask)


def _is_readable(data: Tensor, mask: Tensor) -> bool:
    """Whether a compiled kernel can go through data and mask by their addresses."""
    # A subclass may keep its numbers elsewhere than at its address.
    is_plain = data.is_contiguous() and mask.is_contiguous() and type(data) in (Tensor, torch.nn.Parameter)
    return data.is_cpu and is_plain and data.element_size() in (2, 4, 8) and native.has("holds_zeros")
