"""The schedules of a run as charts."""

import pytest

from rarefy.methods.gmp import GMP
from rarefy.methods.rigl import RigL
from rarefy.methods.set import SET
from rarefy.methods.static import Static
from rarefy.report.schedule_chart import schedule_charts

CUBIC = {"type": "polynomial", "init": 0.0, "final": 0.8, "start": 0, "stop": 100}


def charts(algorithm, total: int = 200):
    return schedule_charts(algorithm, total, key="s", title="t")


def near(pairs) -> list:
    return [pytest.approx(pair) for pair in pairs]


def points(line) -> list[tuple[float, float]]:
    return list(zip(line.series.steps.tolist(), line.series.mean.tolist(), strict=True))


def test_the_target_changes_on_update_steps_only():
    [chart] = charts(GMP(CUBIC, update={"freq": 50, "stop": 150}))
    target, schedule = chart.lines
    expected = [(0, 0.0), (50, 0.8 * 0.875), (100, 0.8), (200, 0.8)]
    assert target.style == "steps" and points(target) == near(expected)
    assert schedule.dashed and dict(points(schedule))[25] == pytest.approx(0.8 - 0.8 * 0.75**3)
    assert list(chart.marks) == [50, 100]
    assert chart.subtitle == "2 updates, from step 50 to step 100 of 200 · 80% at the end"


def test_a_run_that_starts_dense_is_dense_until_its_first_update():
    [chart] = charts(GMP(CUBIC, update={"steps": [60]}))
    assert points(chart.lines[0])[:2] == near([(0, 0.0), (60, 0.8 - 0.8 * 0.4**3)])
    assert chart.subtitle.startswith("1 update, from step 60 to step 60 of 200")


def test_no_update_within_the_run_leaves_it_dense():
    [chart] = charts(SET(0.5, update={"freq": 1, "start": 500}))
    assert points(chart.lines[0]) == [(0, 0), (200, 0)] and "no update within the run" in chart.subtitle


def test_cycling_goes_on_with_every_update():
    [chart] = charts(GMP([0.1, 0.3, 0.6], update={"freq": 60}))
    assert points(chart.lines[0]) == near([(0, 0.1), (60, 0.3), (120, 0.6), (180, 0.1), (200, 0.1)])
    assert len(chart.lines) == 1


def test_static_is_one_line_without_updates():
    [chart] = charts(Static(0.9))
    assert points(chart.lines[0]) == [(0, 0.9), (200, 0.9)] and chart.marks == []
    assert chart.subtitle == "no update after step 0 · 90% at the end"


def test_the_drop_fraction_has_a_chart_of_its_own():
    drop = {"type": "cosine", "init": 0.3, "half_period": 150}
    sparsity, fraction = charts(RigL(0.9, drop_fraction=drop, update={"freq": 50, "stop": 151}))
    assert sparsity.title == "t: sparsity" and fraction.title == "t: drop fraction"
    dots = fraction.lines[-1]
    assert dots.style == "points" and points(dots) == near([(50, 0.225), (100, 0.075), (150, 0.0)])
    assert fraction.subtitle == "22.5% → 0%"


def test_a_constant_drop_fraction_says_so():
    _, fraction = charts(SET(0.9, update={"freq": 50}))
    assert fraction.subtitle == "30% of the active connections at every update" and len(fraction.lines) == 1


def test_a_million_updates_stay_a_picture():
    [chart] = charts(GMP({"type": "linear", "init": 0.0, "slope": 9e-7}), total=1_000_000)
    assert len(chart.lines[0].series) < 1000 and chart.lines[0].series.last == pytest.approx(0.9, abs=0.01)


def test_values_outside_are_clamped():
    [chart] = charts(GMP({"type": "linear", "init": 0.5, "slope": 0.01}, update={"freq": 100}))
    assert points(chart.lines[0]) == [(0, 0.5), (100, 1.0), (200, 1.0)]
