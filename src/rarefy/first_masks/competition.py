"""Which weights keep how many connections, when all of them compete with each other."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rarefy import masks
from rarefy.errors import RarefyError
from rarefy.patterns import Pattern
from rarefy.ties import TieOrder


def compete(
    scores: Mapping[str, Tensor], patterns: Mapping[str, Pattern], sparsity: float, seed: int, source: str
) -> dict[str, float]:
    """The sparsity of each weight when the connections of highest score are kept among all.

    Blocks compete as wholes, by their own scores. In a weight of balanced groups the number that it wins is shared out
    equally among its groups afterwards.

    Args:
        scores: of every connection, by weight.
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
    units = {name: _units(score, patterns[name]) for name, score in scores.items()}
    everything = torch.cat(list(units.values()))
    kept = masks.keep_top(everything, masks.kept_count(everything.numel(), sparsity), TieOrder(seed))
    won: dict[str, float] = {}
    for name, part in zip(units, kept.split([len(one) for one in units.values()]), strict=True):
        won[name] = masks.sparsity_of(part)
    empty = [name for name, share in won.items() if share == 1.0 and units[name].numel()]
    if empty and sparsity < 1.0:
        shown = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        # Under uniform, a measured method lets all weights compete.
        local = "uniform" if source.endswith("global") else "erk"
        remedy = f"give distribution: {local}, a lower sparsity, or a param_filter without them"
        raise RarefyError(f"{source} at sparsity {sparsity:g} leaves no connection in {shown}; {remedy}")
    return won


def _units(scores: Tensor, pattern: Pattern) -> Tensor:
    """The scores of what is kept or dropped as a whole, in one row."""
    pieces = [pattern.structure.fold(piece).reshape(-1) for piece in pattern.split(scores)]
    # On one device: layers may be on several.
    return torch.cat(pieces).cpu()
