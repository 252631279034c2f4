"""SparseGPT: connections of a layer are dropped one input after the other, and those that are left make up for it."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.masks import keep_top, kept_count
from rarefy.patterns.structures import FREE, NOfM, Structure
from rarefy.ties import DEFAULT_ORDER, TieOrder

# Both are those of the paper's own code.
BLOCK = 128
DAMPENING = 0.01


def sparse_gpt(
    weight: Tensor,
    hessian: Tensor,
    sparsity: float,
    structure: Structure = FREE,
    *,
    block: int = BLOCK,
    dampening: float = DAMPENING,
    order: TieOrder = DEFAULT_ORDER,
) -> tuple[Tensor, Tensor]:
    """Prunes a linear layer so that its outputs change little (Frantar & Alistarh, arXiv:2301.00774).

    With H = X Xᵀ + λI and U the upper Cholesky factor of H⁻¹, inputs j are visited in order. Of each block of inputs
    those connections with the highest w² / U_jj² stay; a connection that goes leaves the error e = w / U_jj, and all
    later inputs i of its row change by −e · U_ji, which is the update of optimal brain surgeons.

    Args:
        weight: [out, in], floating point; stays as it is.
        hessian: Σ x xᵀ over the inputs x of the layer, [in, in], float32 or wider.
        sparsity: fraction of inactive connections, in [0, 1].
        structure: `FREE`, or n of m.
        block: inputs whose masks are chosen at a time, as they are then; ≥ 1.
        dampening: λ as a share of the mean of H's diagonal, > 0.
        order: decides among equal scores.

    Returns:
        The new weight, in the number format of `hessian`, with exact zeros; and its mask, bool.

    Raises:
        RarefyError: another structure, or a Hessian that cannot be factorized.

    Example:
        >>> weight, mask = sparse_gpt(torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 0.5)
        >>> mask.sum().item(), round(weight.sum().item(), 2)
        (1, 1.99)
    """
    if structure != FREE and not isinstance(structure, NOfM):
        raise RarefyError(
            f"sparsegpt cannot prune by the pattern {structure}; give unstructured, {{n, m}}, or wanda"
        )
    new = weight.to(hessian.dtype, copy=True)
    factor = _factor(hessian, dampening)
    # An input that is always zero says nothing, so whatever is multiplied with it may go.
    new[:, hessian.diagonal() == 0] = 0
    mask = torch.ones_like(new, dtype=torch.bool)
    # Groups of m are not cut.
    step = max(block // structure.m, 1) * structure.m if isinstance(structure, NOfM) else block
    columns = new.shape[1]
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        errors = _prune_block(new, mask, factor, (start, stop), sparsity, structure, order)
        # Inputs behind the block make up for all of its errors at once, by one product.
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new, mask


def _factor(hessian: Tensor, dampening: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the Hessian."""
    damped = hessian.clone()
    diagonal = damped.diagonal()
    # An input that is always zero would leave the matrix singular.
    diagonal[diagonal == 0] = 1.0
    diagonal += dampening * diagonal.mean()
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
        return torch.linalg.cholesky(inverse, upper=True)
    except torch.linalg.LinAlgError as error:
        reason = str(error).splitlines()[0]
        raise RarefyError(
            f"sparsegpt cannot factorize the Hessian ({reason}); give more batches, or wanda"
        ) from error


def _prune_block(
    weight: Tensor,
    mask: Tensor,
    factor: Tensor,
    columns: tuple[int, int],
    sparsity: float,
    structure: Structure,
    order: TieOrder,
) -> Tensor:
    """Prunes some inputs in place; the errors that their connections leave, [out, inputs]."""
    start, stop = columns
    part = weight[:, start:stop]
    inner = factor[start:stop, start:stop]
    errors = torch.zeros_like(part)
    if structure == FREE:
        mask[:, start:stop] = _largest(part, inner.diagonal(), _share(mask, columns, sparsity), order, start)
    for index in range(stop - start):
        if isinstance(structure, NOfM) and index % structure.m == 0:
            group = slice(index, index + structure.m)
            scores = (part[:, group] / inner.diagonal()[group]).square()
            mask[:, start + index : start + index + structure.m] = structure.keep_top(scores, sparsity, order)
        column = part[:, index].clone()
        kept = column * mask[:, start + index]
        error = (column - kept) / inner[index, index]
        part[:, index:] -= error.unsqueeze(1) * inner[index, index:]
        # Exactly, where the line above may leave rounding.
        part[:, index] = kept
        errors[:, index] = error
    return errors


def _share(mask: Tensor, columns: tuple[int, int], sparsity: float) -> int:
    """How many connections these inputs keep, so that all of them together keep the exact number."""
    rows = len(mask)
    start, stop = columns
    return kept_count(rows * stop, sparsity) - kept_count(rows * start, sparsity)


def _largest(part: Tensor, diagonal: Tensor, count: int, order: TieOrder, start: int) -> Tensor:
    # Another order for each block, or ties would favour the same places in all of them.
    return keep_top((part / diagonal).square(), count, TieOrder(order.seed + start))
