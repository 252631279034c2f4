"""Spec §1: every form of the `sparsity:` block that is accepted, and its warnings."""

from __future__ import annotations

import math
import warnings

import pytest
from torch import nn

import rarefy
from rarefy import GMP, SET, Group, RigL, Static
from rarefy.config import configure
from rarefy.errors import RarefyError
from rarefy.initializers import INITIALIZERS
from rarefy.patterns import Pattern
from rarefy.patterns.structures import Blocks
from rarefy.schedules import AtSteps, Constant, Cosine, Cycling, EveryNSteps, Polynomial

RIGL = {"algorithm": "rigl", "sparsity": 0.9}
CUBIC = {"type": "polynomial", "init": 0, "final": 0.9, "start": 0, "stop": "50%"}


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6))


# ---- accepted forms ----


@pytest.mark.parametrize("number", [0, 0.0, 0.5, 0.99])
def test_a_number_is_static(number):
    algorithm = configure(number)
    assert type(algorithm) is Static and algorithm.sparsity == Constant(number)


@pytest.mark.parametrize(
    ("name", "kind", "sparsity"),
    [
        ("static", Static, 0.5),
        ("gmp", GMP, [0.5, 0.6]),
        ("set", SET, 0.5),
        ("rigl", RigL, 0.5),
        ("RigL", RigL, 0.5),
    ],
)
def test_algorithms_by_name_in_any_case(name, kind, sparsity):
    assert type(configure({"algorithm": name, "sparsity": sparsity})) is kind


def test_defaults():
    algorithm = configure({"algorithm": "set", "sparsity": 0.5})
    assert algorithm.update_schedule == EveryNSteps(freq=1)
    assert algorithm.drop_fraction == Constant(0.3)
    assert algorithm.init_method is INITIALIZERS["random"]
    assert (algorithm.globs, algorithm.pattern, algorithm.seed) == (None, Pattern(), None)
    assert (algorithm.distribution, algorithm.compute) == ("uniform", "auto")
    assert type(configure({"sparsity": 0.5})) is Static


def test_every_option_arrives():
    block = {
        "algorithm": "rigl", "sparsity": [0.5, 0.6], "init_method": "topk", "param_filter": ["0.*", "1.*"],
        "update": {"freq": 5, "start": 10, "stop": 50},
        "drop_fraction": {"type": "cosine", "init": 0.3, "half_period": 9},
        "balance_in_groups": 2, "distribution": "erk", "pattern": {"block": [2, 1]}, "compute": "masked", "seed": 4,
    }  # fmt: skip
    algorithm = configure(block, seed=99)
    assert algorithm.sparsity == Cycling([0.5, 0.6])
    assert algorithm.init_method is INITIALIZERS["topk"]
    assert algorithm.globs == ("0.*", "1.*")
    assert algorithm.update_schedule == EveryNSteps(freq=5, start=10, stop=50)
    assert algorithm.drop_fraction == Cosine(init=0.3, half_period=9)
    assert (algorithm.pattern, algorithm.distribution) == (Pattern(1, 2, Blocks(2, 1)), "erk")
    assert (algorithm.compute, algorithm.seed) == ("masked", 4)


def test_the_callers_block_stays_as_it_is():
    block = {
        "type": "set",
        "schedule": 0.5,
        "param_filter": {"0.*": {"drop_fraction": 0.1}},
        "update": {"freq": 2},
    }
    before = repr(block)
    with pytest.warns(FutureWarning):
        configure(block)
    assert repr(block) == before


def test_the_runs_seed_is_the_default():
    assert configure(0.5, seed=3).seed == 3
    assert configure({"sparsity": 0.5, "seed": 0}, seed=3).seed == 0


def test_ready_algorithms_pass_through():
    ready = SET(0.5)
    assert configure(ready) is ready
    group = configure([ready, {"sparsity": 0.5}])
    assert isinstance(group, Group) and group.algorithms[0] is ready
    assert configure(group) is group


def test_aliases():
    with pytest.warns(FutureWarning, match=r"^sparsity\.type is deprecated; write `algorithm`$"):
        algorithm = configure({"type": "set", "schedule": 0.5})
    assert type(algorithm) is SET and algorithm.sparsity == Constant(0.5)


def test_a_list_is_a_group_and_the_first_match_wins():
    group = configure([{"sparsity": 0.5, "param_filter": "0.weight"}, {"algorithm": "set", "sparsity": 0.75}])
    group.apply(model := two_layers())
    assert [int(layer.weight_mask.sum()) for layer in model] == [8, 6]
    assert [list(algorithm.parameters) for algorithm in group.algorithms] == [["0.weight"], ["1.weight"]]


@pytest.mark.parametrize(
    "block",
    [
        {"groups": [{"algorithm": "set", "params": {"sparsity": 0.5, "param_filter": "0.weight"}}, {"sparsity": 0.75}]},
        {
            "algorithm": "Group",
            "groups": [
                {"algorithm": "set", "sparsity": 0.5, "param_filter": "0.weight"},
                {"sparsity": 0.75},
            ],
        },
        {"groups": [{"params": {"algorithm": "set", "sparsity": 0.5, "param_filter": "0.weight"}}, {"sparsity": 0.75}],
         "algorithm": "group"},
    ],
)  # fmt: skip
def test_model_zoos_nested_form(block):
    group = configure(block)
    assert [type(algorithm) for algorithm in group.algorithms] == [SET, Static]
    assert group.algorithms[0].globs == ("0.weight",)


def test_params_of_a_single_entry_are_flattened():
    assert type(configure({"algorithm": "set", "params": {"sparsity": 0.5}})) is SET


@pytest.mark.parametrize("nested", [False, True])
def test_a_dict_filter_overlays_options_and_the_first_key_wins(nested):
    options = {
        "algorithm": "rigl", "sparsity": 0.5, "drop_fraction": 0.2,
        "param_filter": {"0.weight": {"balance_out_groups": 2, "drop_fraction": 0.1}, "*.weight": None},
    }  # fmt: skip
    group = configure({"params": options} if nested else options)
    group.apply(model := nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(3, 3)))
    first, second = group.algorithms
    assert list(first.parameters) == ["0.weight"] and list(second.parameters) == ["1.weight", "2.weight"]
    assert (first.drop_fraction, second.drop_fraction) == (Constant(0.1), Constant(0.2))
    assert (first.pattern, second.pattern) == (Pattern(0, 2), Pattern())
    assert [int(half.sum()) for half in model[0].weight_mask.chunk(2)] == [4, 4]


def test_parameters_that_match_no_key_of_a_dict_filter_stay_dense():
    configure({"sparsity": 0.5, "param_filter": {"0.weight": {}}}).apply(model := two_layers())
    assert not hasattr(model[1], "weight_mask")


def test_an_overlay_may_change_the_algorithm():
    group = configure({**RIGL, "param_filter": {"0.*": {"algorithm": "set"}, "1.*": None}})
    assert [type(algorithm) for algorithm in group.algorithms] == [SET, RigL]


def test_a_dict_filter_inside_a_list():
    entries = [
        {"sparsity": 0.5, "param_filter": {"0.weight": None, "1.weight": {"sparsity": 0.75}}},
        {"sparsity": 0.1},
    ]
    group = configure([entries[0]])
    group.apply(model := two_layers())
    assert [int(layer.weight_mask.sum()) for layer in model] == [8, 6]
    assert len(configure(entries).algorithms) == 3


def test_percentages_of_the_run():
    block = {"algorithm": "gmp", "sparsity": CUBIC, "update": {"freq": "1%", "start": "0%", "stop": " 75 % "}}
    algorithm = configure(block, num_steps=1000)
    assert algorithm.update_schedule == EveryNSteps(freq=10, start=0, stop=750)
    assert algorithm.sparsity == Polynomial(init=0, final=0.9, start=0, stop=500)
    drop = {"type": "cosine", "init": 0.3, "half_period": "12.5%"}
    algorithm = configure(
        {**RIGL, "drop_fraction": drop, "update": {"steps": ["0%", 7, "50%"]}}, num_steps=1000
    )
    assert algorithm.drop_fraction == Cosine(init=0.3, half_period=125)
    assert algorithm.update_schedule == AtSteps([0, 7, 500])


def test_a_small_percentage_of_a_short_run_is_one_step():
    assert configure({**RIGL, "update": {"freq": "1%"}}, num_steps=10).update_schedule == EveryNSteps(freq=1)


class OfOnesOwn(rarefy.DynamicSparsityAlgorithm):
    """An algorithm with an option of its own."""

    name = "own"

    def __init__(self, sparsity, *, keep_rows=False, **options):
        super().__init__(sparsity, **options)
        self.keep_rows = keep_rows

    def update_mask(self, weight, mask, sparsity, dense_grad):
        return mask


OWN_FILE = """
from rarefy import SET
class Mine(SET):
    pass
def all_active(weight, sparsity):
    return weight == weight
"""


def test_import_paths(tmp_path):
    (tmp_path / "own.py").write_text(OWN_FILE)
    block = {"algorithm": "./own.py:Mine", "sparsity": 0.5, "init_method": "./own.py:all_active"}
    algorithm = configure(block, base_dir=tmp_path)
    algorithm.apply(layer := nn.Linear(4, 4))
    assert type(algorithm).__name__ == "Mine" and bool(layer.weight_mask.all())
    assert type(configure({"algorithm": "rarefy:SET", "sparsity": 0.5})) is SET


def test_classes_and_functions_in_python():
    algorithm = configure({"algorithm": OfOnesOwn, "sparsity": 0.5, "keep_rows": True, "update": {"freq": 2}})
    assert type(algorithm) is OfOnesOwn and algorithm.keep_rows is True
    algorithm = configure(
        {**RIGL, "sparsity": lambda k: 0.25, "init_method": lambda w, s: w > 0, "update": lambda k: k == 3}
    )
    assert algorithm.sparsity(8) == 0.25 and algorithm.update_schedule(3) and not algorithm.update_schedule(4)


# ---- warnings ----


@pytest.mark.parametrize("update", [{"start": 5}, {"stop": 5}, {"start": 1, "stop": 5}])
def test_start_or_stop_without_freq_warns(update):
    with pytest.warns(UserWarning, match=r"^sparsity\.update has no freq: every step is an update step"):
        assert configure({**RIGL, "update": update}).update_schedule.freq == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algorithm": "gmp", "sparsity": {"type": "linear", "init": 0, "slope": 0.1}, "update": {"freq": 5}},
         "sparsity.sparsity is 1.5 at step 15, outside [0, 1]; it is clamped"),
        ({**RIGL, "drop_fraction": {"type": "linear", "init": 0.3, "slope": -0.01}, "update": {"freq": 5}},
         "sparsity.drop_fraction is -0.05 at step 35, outside [0, 1]; it is clamped"),
        ({**RIGL, "sparsity": lambda step: 2.0, "update": {"steps": [7]}},
         "sparsity.sparsity is 2 at step 7, outside [0, 1]; it is clamped"),
        ({"algorithm": "gmp", "sparsity": {"type": "linear", "init": 0, "slope": 0.1}, "update": {"steps": [4, 6]},
          "pattern": {"n": 2, "m": 4}},
         "sparsity.sparsity is 0.6 at step 6, outside [0, 0.5]; it is clamped"),
    ],
)  # fmt: skip
def test_a_schedule_that_leaves_the_unit_interval_on_an_update_step_warns(options, message):
    with pytest.warns(UserWarning) as caught:
        configure(options, num_steps=100)
    assert [str(warning.message) for warning in caught] == [message]


@pytest.mark.parametrize("update", [{"freq": 5, "stop": 10}, {"steps": [0, 10]}, {"freq": 100}])
def test_no_warning_where_it_leaves_between_or_after_the_update_steps(update):
    schedule = {"type": "linear", "init": 0, "slope": 0.1}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        algorithm = configure({"algorithm": "gmp", "sparsity": schedule, "update": update}, num_steps=99)
    assert algorithm.sparsity(11) > 1 and not algorithm.update_schedule(11)


def test_a_drop_fraction_that_drops_nothing_of_n_warns():
    block = {"algorithm": "set", "sparsity": 0.75, "pattern": {"n": 1, "m": 4}}
    with pytest.warns(UserWarning) as caught:
        configure(block)
    assert [str(warning.message) for warning in caught] == [
        "sparsity.drop_fraction 0.3 drops none of 1 in a group of 4, so masks never change; give 0.51 or more"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        configure({**block, "drop_fraction": 0.51})
        configure({**block, "sparsity": 0.5, "pattern": {"n": 2, "m": 4}})


def test_clamping_really_happens():
    with pytest.warns(UserWarning):
        algorithm = configure({**RIGL, "sparsity": lambda step: 2.0}, num_steps=5)
    with pytest.raises(RarefyError, match=r"no connection left at step 0 \(target sparsity 1\)"):
        algorithm.apply(nn.Linear(4, 4))
    assert algorithm.target_sparsity == 1.0
    with pytest.warns(UserWarning):
        algorithm = configure({**RIGL, "sparsity": lambda step: -1.0}, num_steps=5)
    algorithm.apply(layer := nn.Linear(4, 4))
    assert algorithm.target_sparsity == 0.0 and layer.weight_mask.all()


def test_a_function_that_returns_nan_is_an_error_before_anything_is_built():
    with pytest.raises(RarefyError, match="returned NaN at step 0"):
        configure({**RIGL, "sparsity": lambda step: math.nan}, num_steps=5)
    model = two_layers()
    with pytest.raises(RarefyError, match="returned NaN at step 0"):
        configure({**RIGL, "sparsity": lambda step: math.nan}).apply(model)
    assert "0.weight_mask" not in model.state_dict()
