"""From measured layers to the cost rule."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rarefy.cost.calibration import BreakEven, Measurement
from rarefy.errors import RarefyError

_ROUNDS = 50
_TOO_FAST = 3.0  # an expectation that is too fast weighs this many times one that is too slow
_NEAR = 0.5  # cases weigh less the further they are from break-even, on this scale of log time
_FAR = 0.01  # but never less than this
_UNIT = 1e6  # of the overhead, so that the three columns are of similar size
_ERROR = 1.08  # the formula's own error near break-even: every expectation is raised by it


def fit(measurements: Sequence[Measurement]) -> BreakEven:
    """The rule that describes the measured layers and would take none of those that were slower than dense.

    Robust least squares of the relative error (Huber's weights, nothing below zero), in which cases near
    break-even and expectations that are too fast weigh more. Then the whole rule is scaled up by 8%, and more until
    every layer that was measured slower than dense is expected to be slower as well. The limit is at most 1: a full
    weight stays dense.

    Args:
        measurements: at least three, of several densities, sizes and tokens; medians, for a single odd one of a slower
            layer makes the rule more cautious than it need be.

    Raises:
        RarefyError: the measurements do not determine a rule.

    Example:
        >>> truth = BreakEven(0.5, 8, 4e6)
        >>> layers = [(n, n, t, d) for n in (256, 1024) for t in (16, 512) for d in (0.1, 0.5)]
        >>> found = fit([Measurement(*layer, 1.0, truth.relative_time(*layer)) for layer in layers])
        >>> found.limit, found.tokens_offset, found.overhead
        (0.463, 8.0, 4320000.0)
    """
    cases = [[m.density, m.density / m.tokens, _UNIT / (m.rows * m.columns * m.tokens)] for m in measurements]
    terms = torch.tensor(cases, dtype=torch.float64).reshape(-1, 3)
    times = torch.tensor([m.relative_time for m in measurements], dtype=torch.float64)
    if len(cases) < 3 or not bool(torch.isfinite(times).all() and (times > 0).all()):
        raise RarefyError("measurements: give at least three, of times above zero")
    factors = _robust_factors(terms, times)
    expected = terms @ factors
    slope, offset, overhead = (factors * _caution(expected, times)).tolist()
    if slope <= 0:
        raise RarefyError("measurements: they do not depend on the density; measure again on an idle machine")
    slope = max(slope, 1.0)
    limit, tokens_offset, fixed = (float(f"{x:.4g}") for x in (1 / slope, offset / slope, overhead * _UNIT))
    return BreakEven(limit, tokens_offset, fixed)


def _robust_factors(terms: Tensor, times: Tensor) -> Tensor:
    """Non-negative factors f with terms · f ≈ times, by iteratively reweighted least squares."""
    relative = terms / times[:, None]
    near = torch.exp(-((times.log() / _NEAR) ** 2) / 2).clamp(min=_FAR)
    weights = near
    factors = near.new_zeros(3)
    for _ in range(_ROUNDS):
        factors = _non_negative_least_squares(relative, weights)
        error = relative @ factors - 1
        # Made-up times may fit exactly, and leave no error to divide by.
        bound = (2 * error.abs().median()).clamp(min=1e-9)
        weights = near * (bound / error.abs().clamp(min=1e-12)).clamp(max=1)
        weights = torch.where(error < 0, _TOO_FAST * weights, weights)
    return factors


def _non_negative_least_squares(relative: Tensor, weights: Tensor) -> Tensor:
    """Weighted factors f ≥ 0 with relative · f ≈ 1; a factor that would be negative is left out."""
    factors = relative.new_zeros(relative.shape[1])
    used = list(range(relative.shape[1]))
    root = weights.sqrt()[:, None]
    while used:
        solved = torch.linalg.lstsq(relative[:, used] * root, root, driver="gelsd").solution[:, 0]
        if bool((solved >= 0).all()):
            factors[used] = solved
            break
        used.pop(int(solved.argmin()))
    return factors


def _caution(expected: Tensor, times: Tensor) -> float:
    """What the rule is multiplied by so that no layer measured slower than dense is expected to be faster."""
    slower = expected[times > 1]
    return max(_ERROR, float(1 / slower.min())) if slower.numel() else _ERROR
