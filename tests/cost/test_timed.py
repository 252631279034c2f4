"""Layers that are timed once, where the rule may be wrong."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import rarefy
from rarefy.cost import timed as module
from rarefy.cost.calibration import Measurement
from rarefy.cost.measure import Case, measure
from rarefy.cost.timed import Layer, time_layers, timed
from rarefy.storage.choice import TIMED_AT

LAYER = Layer(512, 512, 256, 0.3)
compiled = pytest.mark.skipif(
    rarefy.cost.rule.rule(torch.float32) is None,
    reason="needs the compiled kernels, without which nothing is chosen",
)


@pytest.fixture
def timings(tmp_path, monkeypatch):
    """Switches timing on, in a folder of its own, with a clock that says what the test wants."""
    monkeypatch.setenv("RAREFY_CALIBRATE", "1")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    said = {"relative": 0.5, "cases": []}

    def measure(case, _seconds):
        said["cases"].append(case)
        nn.Linear(3, 3)  # draws from torch's generator, as the real one does
        density = 1 - case.sparsity
        return Measurement(case.rows, case.columns, case.tokens, density, 1.0, said["relative"], case.block)

    monkeypatch.setattr(module, "measure", measure)
    return said


def take_step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(128, 512)).square().mean().backward()
    optimizer.step()


def test_a_layer_is_timed_once_on_a_machine(timings, tmp_path):
    assert timed(LAYER) is None
    time_layers([LAYER, LAYER, Layer(512, 512, 256, 0.301)])
    timings["relative"] = 2.0
    time_layers([LAYER])
    assert len(timings["cases"]) == 1
    assert timed(LAYER) == timed(Layer(512, 512, 256, 0.305)) == 0.5
    assert timed(Layer(512, 512, 257, 0.3)) is None
    assert len(json.loads((tmp_path / "timed.json").read_text())) == 1


def test_times_hold_for_the_number_of_threads(timings, monkeypatch):
    time_layers([LAYER])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert timed(LAYER) is None


def test_it_can_be_turned_off(timings, monkeypatch):
    time_layers([LAYER])
    monkeypatch.setenv("RAREFY_CALIBRATE", "0")
    assert timed(LAYER) is None
    time_layers([Layer(1024, 512, 256, 0.3)])
    assert len(timings["cases"]) == 1


def test_it_ends_after_twenty_seconds(timings, monkeypatch):
    seconds = iter(range(0, 1000, 15))
    monkeypatch.setattr(module.time, "monotonic", lambda: float(next(seconds)))
    time_layers(Layer(512, 512, tokens, 0.3) for tokens in range(256, 266))
    assert len(timings["cases"]) == 1


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": "b", "c": -1.0}', "\x00"])
def test_a_damaged_file_is_no_file(text, timings, tmp_path):
    (tmp_path / "timed.json").write_text(text)
    assert timed(LAYER) is None
    time_layers([LAYER])
    assert timed(LAYER) == 0.5


def test_a_folder_that_cannot_be_written_is_said_and_nothing_is_timed(timings, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path / "file" / "in_it"))
    with pytest.warns(RuntimeWarning, match="cannot be written .* set RAREFY_CACHE to another folder"):
        time_layers([LAYER])
    assert not timings["cases"]


def test_a_folder_in_the_place_of_the_file_is_left_alone(timings, tmp_path):
    (tmp_path / "timed.json" / "in_it").mkdir(parents=True)
    with pytest.warns(RuntimeWarning, match="cannot be written"):
        time_layers([LAYER])
    assert [path.name for path in tmp_path.iterdir()] == ["timed.json"]


def test_what_another_process_writes_meanwhile_is_kept(timings, monkeypatch):
    other = Layer(1024, 512, 256, 0.3)
    measure = module.measure

    def while_the_other_writes(case, seconds):
        monkeypatch.setattr(module, "measure", measure)
        time_layers([other])
        return measure(case, seconds)

    monkeypatch.setattr(module, "measure", while_the_other_writes)
    time_layers([LAYER])
    assert timed(other) == timed(LAYER) == 0.5


def test_layers_are_timed_outside_of_autocast(timings, monkeypatch):
    measure = module.measure
    seen = []
    monkeypatch.setattr(
        module, "measure", lambda *given: seen.append(torch.is_autocast_enabled("cpu")) or measure(*given)
    )
    with torch.autocast("cpu"):
        time_layers([LAYER])
    assert seen == [False]


def test_random_numbers_stay_what_they_are(timings):
    torch.manual_seed(5)
    state = torch.get_rng_state()
    time_layers([LAYER])
    assert torch.equal(torch.get_rng_state(), state)


def test_only_what_may_matter_is_timed():
    assert not Layer(64, 64, 64, 0.3).is_doubtful(has_run=True)
    assert not Layer(4096, 4096, 64, 0.9).is_doubtful(has_run=True)
    assert not Layer(4096, 4096, 64, 0.3, torch.float64).is_doubtful(has_run=True)


@compiled
def test_a_rule_that_knows_the_machine_is_believed_at_first_and_where_it_is_sure():
    break_even = 1 - rarefy.cost.break_even_sparsity(2048, 2048, 512)
    edge = Layer(2048, 2048, 512, break_even)
    assert not edge.is_doubtful(has_run=False)
    assert edge.is_doubtful(has_run=True)
    assert not Layer(2048, 2048, 512, 0.02).is_doubtful(has_run=True)


def test_a_rule_that_does_not_know_the_machine_is_helped_at_once(monkeypatch):
    monkeypatch.setattr(module, "rule", lambda *_: None)
    assert Layer(2048, 2048, 512, 0.02).is_doubtful(has_run=False)


@compiled
@pytest.mark.parametrize(("relative", "kind"), [(0.5, "compact"), (0.99, "masked"), (1.5, "masked")])
def test_auto_goes_by_the_time_after_twenty_steps(relative, kind, timings):
    timings["relative"] = relative
    model = nn.Linear(512, 512)
    sparsity = rarefy.Static(0.7, seed=1)
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsity.apply(optimizer)
    for _ in range(TIMED_AT - 1):
        take_step(model, optimizer)
    assert not timings["cases"]
    take_step(model, optimizer)
    assert [(case.tokens, case.block) for case in timings["cases"]] == [(128, None)]
    assert sparsity.parameters["weight"].storage.kind == kind


def test_the_real_measurement(tmp_path, monkeypatch):
    monkeypatch.setenv("RAREFY_CALIBRATE", "1")
    monkeypatch.setenv("RAREFY_CACHE", str(tmp_path))
    layer = Layer(16, 16, 8, 0.5)
    with torch.no_grad():
        time_layers([layer])
    assert timed(layer) > 0


def test_layers_are_timed_on_the_cpu_whatever_the_default_device_is():
    with torch.device("meta"):
        assert measure(Case(16, 16, 8, 0.5), seconds=0).relative_time > 0
