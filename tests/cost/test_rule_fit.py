"""The cost rule fitted to measurements made up from a known rule."""

from __future__ import annotations

import itertools
import random

import pytest

from rarefy.cost.calibration import BreakEven, Measurement
from rarefy.cost.rule_fit import fit
from rarefy.errors import RarefyError

TRUTH = BreakEven(limit=0.6, tokens_offset=10, overhead=4e6)
LAYERS = list(itertools.product((256, 768, 2048), (256, 1024), (16, 64, 512), (0.05, 0.2, 0.4, 0.5)))
RAISED = 1.08


def measured(noise: float = 0.0, odd: int = 0) -> list[Measurement]:
    """Layers that obey the rule but for noise; `odd` of the fast ones were disturbed and took five times as long."""
    draw = random.Random(0)
    times = {layer: TRUTH.relative_time(*layer) * (1 + draw.uniform(-noise, noise)) for layer in LAYERS}
    for layer in [one for one in LAYERS if times[one] < 0.15][:odd]:
        times[layer] *= 5
    return [Measurement(*layer, dense=0.25, sparse=0.25 * time) for layer, time in times.items()]


def test_exact_measurements_give_the_rule_raised_by_its_error() -> None:
    found = fit(measured())
    assert found.limit * RAISED == pytest.approx(TRUTH.limit, rel=2e-3)
    assert found.tokens_offset == pytest.approx(TRUTH.tokens_offset, rel=2e-3)
    assert found.overhead == pytest.approx(TRUTH.overhead * RAISED, rel=2e-3)


def test_it_is_the_same_for_the_same_measurements_in_any_order() -> None:
    layers = measured(noise=0.1)
    assert fit(layers) == fit(layers)
    assert fit(layers[::-1]).limit == pytest.approx(fit(layers).limit, rel=1e-3)


def test_disturbed_measurements_hardly_move_it() -> None:
    calm, disturbed = fit(measured(noise=0.02)), fit(measured(noise=0.02, odd=4))
    assert disturbed.limit == pytest.approx(calm.limit, rel=0.05)


@pytest.mark.parametrize("seed", range(5))
def test_no_layer_that_was_slower_is_expected_to_be_faster(seed: int) -> None:
    draw = random.Random(seed)
    layers = [
        Measurement(*layer, dense=1.0, sparse=TRUTH.relative_time(*layer) * draw.uniform(0.6, 1.7))
        for layer in LAYERS
    ]
    rule = fit(layers)
    slower = [one for one in layers if one.relative_time > 1]
    assert slower
    for one in slower:
        assert rule.relative_time(one.rows, one.columns, one.tokens, one.density) > 0.999


def test_a_full_weight_stays_dense_however_slow_dense_products_are() -> None:
    layers = [Measurement(*layer, dense=50.0, sparse=TRUTH.relative_time(*layer)) for layer in LAYERS]
    assert fit(layers).limit == 1


def test_what_grows_with_nothing_gets_no_negative_part() -> None:
    layers = [Measurement(*layer, dense=1.0, sparse=2 * layer[3] * (1 - 4 / layer[2])) for layer in LAYERS]
    found = fit(layers)
    assert found.tokens_offset == 0 and found.overhead >= 0


@pytest.mark.parametrize("count", [0, 2])
def test_too_few_measurements_are_refused(count: int) -> None:
    with pytest.raises(RarefyError, match="give at least three"):
        fit(measured()[:count])


def test_measurements_without_any_slope_are_refused() -> None:
    layers = [Measurement(256, 256, 16, density, 1.0, 1 - density) for density in (0.1, 0.3, 0.5)]
    with pytest.raises(RarefyError, match="do not depend on the density"):
        fit(layers)
