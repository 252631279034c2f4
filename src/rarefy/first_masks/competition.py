"""Which weights keep how many connections, when all of them compete with each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy import masks
from rarefy.distributed import are_cut_alike, whole
from rarefy.errors import RarefyError
from rarefy.patterns import FREE, Pattern
from rarefy.ties import TieOrder


def compete(
    scores: Mapping[str, Tensor], patterns: Mapping[str, Pattern], sparsity: float, seed: int, source: str
) -> dict[str, float]:
    """The sparsity of each weight when the connections of highest score are kept among all.

    Blocks compete as wholes, by their own scores. In a weight of balanced groups the number that it wins is shared out
    equally among its groups afterwards.

    Args:
        scores: of every connection, by weight; those of DTensors are gathered only where a pattern has to be obeyed.
        patterns: of each weight; of one structure.
        sparsity: of all of them together, in [0, 1].
        seed: decides among equal scores.
        source: what asks, for messages.

    Returns:
        A sparsity for each weight, at which its pattern keeps what it has won.

    Raises:
        RarefyError: a weight would be left without a connection.

    Example:
        >>> both = {"a": torch.tensor([[3.0, 4.0]]), "b": torch.tensor([[1.0, 2.0]])}
        >>> compete(both, dict.fromkeys(both, Pattern()), 0.25, 0, "init_method snip")
        {'a': 0.0, 'b': 0.5}
    """
    units = _units(scores, patterns)
    count = masks.kept_count(sum(one.numel() for one in units.values()), sparsity)
    kept = masks.shares_of_top(list(units.values()), count, TieOrder(seed))
    won = {
        name: 1.0 - share / one.numel() if one.numel() else 0.0
        for (name, one), share in zip(units.items(), kept, strict=True)
    }
    empty = [name for name, share in won.items() if share == 1.0 and units[name].numel()]
    if empty and sparsity < 1.0:
        shown = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        # Under uniform, a measured method lets all weights compete.
        local = "uniform" if source.endswith("global") else "erk"
        remedy = f"give distribution: {local}, a lower sparsity, or a param_filter without them"
        raise RarefyError(f"{source} at sparsity {sparsity:g} leaves no connection in {shown}; {remedy}")
    return won


def _units(scores: Mapping[str, Tensor], patterns: Mapping[str, Pattern]) -> dict[str, Tensor]:
    """The scores of what is kept or dropped as a whole, in any order: DTensors where these are single connections."""
    are_free = all(patterns[name].axis is None and patterns[name].structure == FREE for name in scores)
    if are_free and are_cut_alike(scores.values()):
        return dict(scores)
    return {name: _folded(whole(one), patterns[name]) for name, one in scores.items()}


def _folded(score: Tensor, pattern: Pattern) -> Tensor:
    return torch.cat([pattern.structure.fold(piece).reshape(-1) for piece in pattern.split(score)])
