"""How long a sparse layer takes against a dense one, measured on this machine."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rarefy.cost.calibration import Measurement
from rarefy.nn.linear import SparseLinear

_SAMPLE = 1e-3  # seconds that one reading of the clock covers at least
_PASSES = 3
_LONGEST = 0.3  # seconds that a dense step may take in a calibration, by estimate
Clock = Callable[[], float]


@dataclass(frozen=True)
class Case:
    """A layer and what it is given.

    Args:
        rows: output features.
        columns: input features.
        tokens: rows of the activations.
        sparsity: of its weight, in [0, 1).
        dtype: of the activations; other than float32, autocast's.
        block: outputs and inputs of the blocks that are active as a whole; None for single connections.
    """

    rows: int
    columns: int
    tokens: int
    sparsity: float
    dtype: torch.dtype = torch.float32
    block: tuple[int, int] | None = None

    def mask(self, generator: torch.Generator) -> Tensor:
        """Random connections, or random blocks."""
        height, width = self.block or (1, 1)
        blocks = self.rows // height, self.columns // width
        active = torch.rand(blocks, generator=generator, device="cpu") >= self.sparsity
        return active.repeat_interleave(height, 0).repeat_interleave(width, 1)


def calibration_cases(dtype: torch.dtype, block: tuple[int, int] | None = None) -> list[Case]:
    """The layers that the cost rule is fitted to: around break-even, from 16 tokens on.

    With fewer tokens the dense layer waits for memory; the rule then expects less of the sparse one than it does.

    Example:
        >>> len(calibration_cases(torch.float32))
        62
    """
    layers = [(256, 256, t) for t in (64, 256, 1024)] + [(768, 768, t) for t in (16, 64, 256, 1024)]
    layers += [(512, 512, t) for t in (64, 256)]
    layers += [(3072, 768, t) for t in (16, 64, 256)] + [(2048, 2048, t) for t in (16, 128)]
    cases = [Case(*layer, s, dtype, block) for layer in layers for s in (0.5, 0.7, 0.85, 0.95)]
    very_large = [Case(4096, 4096, t, s, dtype, block) for t in (16, 64) for s in (0.5, 0.7, 0.9)]
    return cases + very_large


def affordable(cases: Sequence[Case]) -> list[Case]:
    """The cases whose dense layer is fast enough on this machine, judged by a small one.

    Example:
        >>> affordable([Case(64, 64, 64, 0.5), Case(10**9, 10**9, 64, 0.5)])
        [Case(rows=64, columns=64, tokens=64, sparsity=0.5, dtype=torch.float32, block=None)]
    """
    per_product = {}
    for dtype in {case.dtype for case in cases}:
        small = Case(256, 256, 64, 0.9, dtype)
        per_product[dtype] = measure(small, seconds=0.02).dense / (256 * 256 * 64)
    return [c for c in cases if c.rows * c.columns * c.tokens * per_product[c.dtype] <= _LONGEST]


def measure_repeatedly(
    cases: Sequence[Case], seconds: float, clock: Clock = time.perf_counter
) -> Iterator[Measurement | None]:
    """Measures every case in three passes, so that what disturbs the machine for a while disturbs one of them.

    Args:
        cases: the layers.
        seconds: for one measurement, see `measure`.
        clock: what the time is read from.

    Yields:
        None after each measurement but the last of a case, then the one of median relative time.

    Example:
        >>> [found is None for found in measure_repeatedly([Case(8, 8, 4, 0.5)], seconds=0)]
        [True, True, False]
    """
    found: dict[Case, list[Measurement]] = {case: [] for case in cases}
    # Of its own: the generators that a program draws from stay where they are.
    shuffle = random.Random(0)
    for _ in range(_PASSES):
        for case in shuffle.sample(list(found), len(found)):
            found[case].append(measure(case, seconds, clock))
            yield _median(found[case]) if len(found[case]) == _PASSES else None


def _median(measurements: list[Measurement]) -> Measurement:
    return sorted(measurements, key=lambda one: one.relative_time)[len(measurements) // 2]


def measure(case: Case, seconds: float, clock: Clock = time.perf_counter) -> Measurement:
    """Times forward and backward of `nn.Linear` and of `SparseLinear` in turns; medians.

    Args:
        case: the layer.
        seconds: to spend, about; at least three turns are taken.
        clock: what the time is read from.

    Example:
        >>> measure(Case(8, 8, 4, 0.5), seconds=0).relative_time > 0
        True
    """
    # Imported late: it brings fractions, decimals and random numbers along.
    from statistics import median

    runs = _steps(case)
    # The first calls allocate memory and choose kernels; they only tell how many calls a reading needs.
    warm = [max(_time(run, 1, clock) for _ in range(2)) for run in runs]
    calls = [max(1, round(_SAMPLE / max(one, 1e-6))) for one in warm]
    turn = sum(count * one for count, one in zip(calls, warm, strict=True))
    turns = min(99, max(3, round(seconds / max(turn, 1e-6))))
    # In turns: a processor that slows down or a busy neighbour meets both layers alike.
    times = [[_time(run, count, clock) for run, count in zip(runs, calls, strict=True)] for _ in range(turns)]
    dense, sparse = (median(column) for column in zip(*times, strict=True))
    return Measurement(case.rows, case.columns, case.tokens, 1 - case.sparsity, dense, sparse, case.block)


def _steps(case: Case) -> list[Callable[[], object]]:
    """A step of the dense layer and one of the sparse layer, the same numbers each time."""
    # On the CPU in so many words, as a program may have made another device the default.
    generator = torch.Generator("cpu").manual_seed(0)
    dense = nn.Linear(case.columns, case.rows, device="cpu", dtype=torch.float32)
    sparse = SparseLinear.from_linear(dense, case.mask(generator), case.block)
    x, grad = (
        # Drawn in float32, so that every dtype is given the same numbers.
        torch.randn(case.tokens, width, generator=generator, device="cpu").to(case.dtype)
        for width in (case.columns, case.rows)
    )
    x.requires_grad_()
    return [_step(layer, x, grad) for layer in (dense, sparse)]


def _step(layer: nn.Module, x: Tensor, grad: Tensor) -> Callable[[], object]:
    leaves = [x, *layer.parameters()]

    def run() -> object:
        with torch.autocast("cpu", x.dtype, enabled=x.dtype != torch.float32):
            y = layer(x)
        # Not `backward`, which would add to `.grad` and cost another addition from the second call on.
        return torch.autograd.grad(y, leaves, grad)

    return run


def _time(run: Callable[[], object], calls: int, clock: Clock) -> float:
    """Seconds of one call, averaged over several; never zero, whatever the clock's resolution."""
    start = clock()
    for _ in range(calls):
        run()
    return max(clock() - start, 1e-9) / calls
