"""Floating-point operations of a forward pass, dense and sparse."""

from __future__ import annotations

import numpy as np

from rarefy.report.run_data import Run
from rarefy.report.series import Series


def dense_flops(run: Run) -> int | None:
    """Operations with every weight dense; None if they were not counted."""
    return run.record.get("forward", {}).get("total") or None


def sparse_flops(run: Run) -> float | None:
    """Operations without those on inactive connections of the newest checkpoint; None if not known."""
    dense = dense_flops(run)
    if dense is None or not run.masks:
        return None
    weights = run.record["forward"]["weights"]
    return dense - sum(weights.get(mask.name, 0) * mask.sparsity for mask in run.masks)


def flops_over_time(run: Run) -> Series | None:
    """Operations against dense at every logged step; None where the parameters' sparsity was not logged."""
    dense = dense_flops(run)
    actual = run.of_parameters("actual")
    if dense is None or not actual:
        return None
    weights = run.record["forward"]["weights"]
    steps = next(iter(actual.values())).steps
    saved = np.zeros_like(steps)
    for name, series in actual.items():
        saved += weights.get(name, 0) * np.interp(steps, series.steps, series.mean)
    return Series.of(steps, 1 - saved / dense)
