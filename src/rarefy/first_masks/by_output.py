"""Masks in which the connections of each output compete among themselves."""

from __future__ import annotations

from torch import Tensor

from rarefy.first_masks.task import Task
from rarefy.masks import keep_top_in_rows, kept_count
from rarefy.patterns.structures import FREE
from rarefy.ties import TieOrder


def keep_by_output(task: Task, name: str, scores: Tensor) -> Tensor:
    """The mask of one weight in which each output keeps as many connections as the others.

    Where the pattern is one of n of m or blocks, its groups or its blocks compete as they always do.

    Args:
        task: that the weight belongs to.
        name: of the weight.
        scores: of its connections, in its own shape.

    Returns:
        Bool, of the shape of the scores.
    """
    pattern = task.patterns[name]
    sparsity = task.targets[name]
    if pattern.structure != FREE:
        return task.keep_top(name, scores, sparsity)
    # Without groups a pattern leaves a weight [in, out] as it is.
    is_turned = pattern.axes.transposed and pattern.axis is None
    whole = scores.transpose(0, 1) if is_turned else scores
    kept = pattern.merge([_by_output(piece, sparsity, task.order(name)) for piece in pattern.split(whole)])
    return kept.transpose(0, 1).contiguous() if is_turned else kept


def _by_output(scores: Tensor, sparsity: float, order: TieOrder) -> Tensor:
    """The mask of the highest scores in each row [out, …]; at least one of each."""
    rows = scores.flatten(1)
    count = kept_count(rows.shape[1], sparsity)
    at_least = 1 if sparsity < 1.0 else 0
    return keep_top_in_rows(rows, max(count, at_least), order).view(scores.shape)
