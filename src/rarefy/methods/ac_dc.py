"""Alternating compressed and decompressed training (Peste et al., arXiv:2106.12379)."""

from __future__ import annotations

from typing import Any, ClassVar

from rarefy.algorithms.option_checks import check_reach, parse_fraction, require_constant
from rarefy.algorithms.options import Sparsity, Update
from rarefy.methods.gmp import GMP
from rarefy.methods.phases import Alternating, phases
from rarefy.patterns import parse_pattern


class ACDC(GMP):
    """Trains sparse and dense in turn, and ends sparse: the dense phases let pruned connections come back.

    Each update step ends a phase. The first begins a compressed one: mask = top of |w| at `sparsity`. The next begins
    a decompressed one, with all connections, those that come back at zero; and so on. Before the first update the
    weights are dense (the paper's warm-up). The last phase is compressed: a last update that would not be is left out.

    Args:
        sparsity: fraction of inactive connections in compressed phases, a number in [0, 1).
        update: the ends of phases: `{freq, start, stop}` with `freq` steps a phase, a warm-up of `start` steps and no
            phase that begins at `stop` or later; or `{steps: [...]}` for phases of different lengths.
        **options: the options of `DynamicSparsityAlgorithm`.

    Raises:
        ConfigError: a sparsity that is no number, or updates that have no end.

    Example:
        >>> import torch
        >>> algorithm = ACDC(0.9, update={"freq": 10, "start": 20, "stop": 60})
        >>> algorithm.update_schedule.steps, [algorithm.target_at(step, 0) for step in (20, 30, 40)]
        ([20, 30, 40], [0.9, 0.0, 0.9])
    """

    name: ClassVar[str] = "ac_dc"
    by_pieces: ClassVar[bool] = True

    def __init__(self, sparsity: Sparsity, *, update: Update = None, **options: Any) -> None:
        compressed = parse_fraction(sparsity, "sparsity", below_one=True)
        require_constant(compressed, "ac_dc")
        # Here, where the sparsity is still the one number that the user wrote.
        structure = parse_pattern(options.get("pattern", "unstructured"), None, None).structure
        check_reach(compressed, structure, "uniform")
        steps = phases(update)
        super().__init__(Alternating(compressed(0), tuple(steps)), update={"steps": steps}, **options)
