"""Floating-point operations of a forward pass and of the training so far, and memory: dense and sparse."""

from __future__ import annotations

import numpy as np

from rarefy.report.run_data import Run
from rarefy.report.scale import readable, scaled
from rarefy.report.series import Series

MEMORY = {"weights": "weights, masks and indices", "gradients": "gradients", "states": "optimizer states"}


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


def training_rows(run: Run) -> list[tuple[str, str, str, str]]:
    """What training has taken by the last logged step, and the memory that it keeps; nothing where none was logged."""
    kinds = [("training so far", "flops", "FLOP")]
    kinds += [(name, f"memory/{key}", "B") for key, name in MEMORY.items()]
    found = ((name, *_ends(run, metric), unit) for name, metric, unit in kinds)
    return [
        (name, scaled(dense, unit), scaled(sparse, unit), readable(sparse / dense, "percent"))
        for name, dense, sparse, unit in found
        if dense
    ]


def training_share(run: Run) -> Series | None:
    """Operations of the training up to every logged step against dense; None where they were not logged."""
    if not all(f"flops/{kind}" in run.metrics for kind in ("sparse", "dense")):
        return None
    sparse = run.metrics["flops/sparse"]
    dense = run.metrics["flops/dense"]
    return Series.of(sparse.steps, sparse.mean / np.interp(sparse.steps, dense.steps, dense.mean))


def _ends(run: Run, metric: str) -> tuple[float, float]:
    """The last dense and the last sparse value; zeros where they were not logged."""
    both = [run.metrics.get(f"{metric}/{kind}") for kind in ("dense", "sparse")]
    dense, sparse = (0.0 if series is None else series.last for series in both)
    return dense, sparse
