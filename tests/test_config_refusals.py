"""Spec §1: every refusal of the `sparsity:` block, with its complete line: path, value, fix."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import rarefy
from contract_rows import takes
from rarefy import RigL
from rarefy.config import configure
from rarefy.errors import ConfigError
from rarefy.methods.registry import ALGORITHMS


def takers(option):
    return ", ".join(name for name in ALGORITHMS if takes(name, option))


RIGL = {"algorithm": "rigl", "sparsity": 0.9}


def two_layers():
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 6))


def refusal(block, **context):
    with pytest.raises(ConfigError) as caught:
        configure(block, **context)
    message = str(caught.value)
    assert "\n" not in message
    return message


class WithOption(rarefy.DynamicSparsityAlgorithm):
    """An algorithm with an option of its own."""

    def __init__(self, sparsity, *, keep_rows=False, **options):
        super().__init__(sparsity, **options)
        if keep_rows == "bad":
            raise ValueError("keep_rows is bad")

    def update_mask(self, weight, mask, sparsity, dense_grad):
        return mask


CASES = [
    (
        90,
        "sparsity: 90 is not allowed; give a fraction in [0, 1); did you mean 0.9?",
    ),
    (
        1,
        "sparsity: 1 is not allowed; give a fraction in [0, 1) (example: sparsity: 0.9)",
    ),
    (
        -0.5,
        "sparsity: -0.5 is not allowed; give a fraction in [0, 1) (example: sparsity: 0.9)",
    ),
    (
        math.nan,
        "sparsity: nan is not allowed; give a number (example: 0.3)",
    ),
    (
        True,
        "sparsity: true is not allowed; give a number, a dict of options, or a list of dicts (example: "
        "sparsity: 0.9)",
    ),
    (
        "high",
        "sparsity: 'high' is not allowed; give a number, a dict of options, or a list of dicts (example: "
        "sparsity: 0.9)",
    ),
    (
        [],
        "sparsity: an empty list is not allowed; give at least one entry, or null for dense training",
    ),
    (
        [0.9],
        "sparsity[0]: 0.9 is not allowed; give a dict of options (example: {algorithm: set, sparsity: 0.9})",
    ),
    (
        {},
        "sparsity.sparsity: a missing value is not allowed; give a number in [0, 1) or a schedule (example: "
        "sparsity: 0.9)",
    ),
    (
        {"sparsity": None},
        "sparsity.sparsity: a missing value is not allowed; give a number in [0, 1) or a schedule (example: "
        "sparsity: 0.9)",
    ),
    (
        {"sparsity": 90},
        "sparsity.sparsity: 90 is not allowed; give a fraction in [0, 1); did you mean 0.9?",
    ),
    (
        {**RIGL, "sparsity": [0.5, math.nan]},
        "sparsity.sparsity[1]: nan is not allowed; give a list of numbers (example: [0.5, 0.9])",
    ),
    (
        {"sparsty": 0.5},
        "sparsity: the key 'sparsty' is not allowed; give a known key (did you mean sparsity?)",
    ),
    (
        {"sparsity": 0.5, "algoritm": "set"},
        "sparsity: the key 'algoritm' is not allowed; give a known key (did you mean algorithm?)",
    ),
    (
        {"sparsity": 0.5, "schedule": 0.5},
        "sparsity: `schedule` together with `sparsity` is not allowed; give only `sparsity`",
    ),
    (
        {"type": "set", "algorithm": "set", "sparsity": 0.5},
        "sparsity: `type` together with `algorithm` is not allowed; give only `algorithm`",
    ),
    (
        {**RIGL, "algorithm": "riggl"},
        "sparsity.algorithm: 'riggl' is not allowed; give a known algorithm (did you mean rigl?) or "
        "package.module:Class of one",
    ),
    (
        {**RIGL, "algorithm": 3},
        f"sparsity.algorithm: 3 is not allowed; give a known algorithm (one of {', '.join(ALGORITHMS)}) or "
        "package.module:Class of one",
    ),
    (
        {**RIGL, "algorithm": "collections:OrderedDict"},
        "sparsity.algorithm: <class 'collections.OrderedDict'> is not allowed; give a known algorithm (one "
        f"of {', '.join(ALGORITHMS)}) or package.module:Class of one",
    ),
    (
        {**RIGL, "algorithm": rarefy.DynamicSparsityAlgorithm},
        "sparsity.algorithm: DynamicSparsityAlgorithm is not allowed; give a class that implements `update` (a "
        "SparsityAlgorithm) or `update_mask` (a DynamicSparsityAlgorithm)",
    ),
    (
        {"sparsity": 0.5, "update": {"freq": 1}},
        f"sparsity: `update` with algorithm static is not allowed; give it with {takers('update')} only, or leave "
        "it out",
    ),
    (
        {"sparsity": 0.5, "drop_fraction": 0.1},
        f"sparsity: `drop_fraction` with algorithm static is not allowed; give it with "
        f"{takers('drop_fraction')} only, or leave it out",
    ),
    (
        {"algorithm": "gmp", "sparsity": [0, 0.5], "drop_fraction": 0.1},
        f"sparsity: `drop_fraction` with algorithm gmp is not allowed; give it with "
        f"{takers('drop_fraction')} only, or leave it out",
    ),
    (
        {"algorithm": "gmp", "sparsity": 0.5},
        "sparsity.sparsity: the constant 0.5 is not allowed; give a schedule for gmp, or algorithm: static "
        "(example: sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000})",
    ),
    (
        {"sparsity": [0.5, 0.6]},
        "sparsity.sparsity: a schedule is not allowed; give a number in [0, 1) for static, or algorithm: gmp "
        "(example: sparsity: 0.9)",
    ),
    (
        {**RIGL, "update": {"freq": 0}},
        "sparsity.update.freq: 0 is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)",
    ),
    (
        {**RIGL, "update": {"freq": 2, "start": 9, "stop": 9}},
        "sparsity.update: {'freq': 2, 'start': 9, 'stop': 9} is not allowed; give a stop after start (start "
        "is 9, stop is 9)",
    ),
    (
        {**RIGL, "update": {"steps": [3, 2]}},
        "sparsity.update: {'steps': [3, 2]} is not allowed; give a rising list of step numbers ≥ 0",
    ),
    (
        {**RIGL, "update": {"steps": [-3, 2]}},
        "sparsity.update.steps[0]: -3 is not allowed; give a rising list of step numbers ≥ 0 (example: "
        "steps: [0, 100, 200])",
    ),
    (
        {**RIGL, "update": {"frq": 1}},
        "sparsity.update: the key 'frq' is not allowed; give a known key (did you mean freq?)",
    ),
    (
        {**RIGL, "update": 100},
        "sparsity.update: 100 is not allowed; give {freq, start, stop} or {steps: [...]} (example: update: "
        "{freq: 100, stop: 7500})",
    ),
    (
        {**RIGL, "drop_fraction": 30},
        "sparsity.drop_fraction: 30 is not allowed; give a fraction in [0, 1]; did you mean 0.3?",
    ),
    (
        {**RIGL, "drop_fraction": {"type": "cosine", "init": 30, "half_period": 5}},
        "sparsity.drop_fraction.init: 30 is not allowed; give a fraction in [0, 1]; did you mean 0.3?",
    ),
    (
        {**RIGL, "drop_fraction": {"type": "cosin"}},
        "sparsity.drop_fraction.type: 'cosin' is not allowed; give a known schedule (did you mean cosine?)",
    ),
    (
        {**RIGL, "balance_in_groups": 0},
        "sparsity.balance_in_groups: 0 is not allowed; give a whole number of groups ≥ 1 (example: "
        "balance_in_groups: 12)",
    ),
    (
        {**RIGL, "balance_in_groups": 2, "balance_out_groups": 2},
        "sparsity.balance_in_groups: together with balance_out_groups is not allowed; give only one of the "
        "two",
    ),
    (
        {**RIGL, "distribution": "erg"},
        "sparsity.distribution: 'erg' is not allowed; give uniform, er, erk or global (example: distribution: erk)",
    ),
    (
        {"sparsity": 0.5, "distribution": "erk", "pattern": {"n": 2, "m": 4}},
        "sparsity.distribution: erk with the pattern {n: 2, m: 4} is not allowed; give uniform, as every weight keeps "
        "n of m",
    ),
    (
        {**RIGL, "pattern": {"n": 4, "m": 2}},
        "sparsity.pattern: {'n': 4, 'm': 2} is not allowed; give whole numbers 1 ≤ n < m: n of every m inputs are "
        "active (example: pattern: {n: 2, m: 4})",
    ),
    (
        {**RIGL, "pattern": {"block": 8}},
        "sparsity.pattern.block: 8 is not allowed; give two whole numbers ≥ 1, the outputs and inputs of a block "
        "(example: pattern: {block: [8, 8]})",
    ),
    (
        {**RIGL, "pattern": {"n": 2, "m": 4}},
        "sparsity.sparsity: 0.9 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}",
    ),
    (
        {"algorithm": "set", "sparsity": 0.6, "pattern": {"n": 1, "m": 3}},
        "sparsity.sparsity: 0.6 is not allowed; give 0.666667, which is 1 − n/m for {n: 1, m: 3}",
    ),
    (
        {"algorithm": "gmp", "sparsity": [0.25, 0.75], "pattern": {"n": 2, "m": 4}},
        "sparsity.sparsity[1]: 0.75 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}",
    ),
    (
        {"algorithm": "gmp", "sparsity": [0, 0.25], "pattern": {"n": 2, "m": 4}},
        "sparsity.sparsity[1]: 0.25 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}",
    ),
    (
        {
            "algorithm": "gmp",
            "sparsity": {"type": "exp", "init": 0, "gamma": -0.1},
            "pattern": {"n": 2, "m": 4},
        },
        "sparsity.sparsity.final: 1 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}",
    ),
    (
        {
            "algorithm": "set",
            "sparsity": {"type": "power", "init": 0.9, "beta": 0.5},
            "pattern": {"n": 2, "m": 4},
        },
        "sparsity.sparsity.init: 0.9 is not allowed; give at most 0.5, which is 1 − n/m for {n: 2, m: 4}",
    ),
    (
        {**RIGL, "compute": "sparse"},
        "sparsity.compute: 'sparse' is not allowed; give auto, masked, compact or {compact: half} "
        "(example: compute: auto)",
    ),
    (
        {**RIGL, "seed": 1.5},
        "sparsity.seed: 1.5 is not allowed; give a whole number (example: seed: 1)",
    ),
    (
        {**RIGL, "init_method": "topp"},
        "sparsity.init_method: 'topp' is not allowed; give a known method (did you mean topk?) (example: "
        "init_method: topk)",
    ),
    (
        {**RIGL, "init_method": "math:pi"},
        "sparsity.init_method: 3.141592653589793 is not allowed; give a known method (one of checkerboard, "
        "from_zeros, grasp, magnitude_mixed, random, snip, synflow, topk, topk_of, wanda) (example: init_method: "
        "topk)",
    ),
    (
        {**RIGL, "init_method": "math:nope"},
        "sparsity.init_method: 'math:nope' (there is no nope in it) is not allowed; give a name that it "
        "defines",
    ),
    (
        {**RIGL, "param_filter": []},
        "sparsity.param_filter: [] is not allowed; give a glob or a list of globs (example: param_filter: "
        '"*.ffn.*")',
    ),
    (
        {**RIGL, "param_filter": {}},
        "sparsity.param_filter: an empty dict is not allowed; give at least one glob",
    ),
    (
        {**RIGL, "param_filter": {"*": 3}},
        "sparsity.param_filter.*: 3 is not allowed; give a dict of options, or null for no override",
    ),
    (
        {**RIGL, "param_filter": {"*": {"drop_fraction": 30}}},
        "sparsity.param_filter.*.drop_fraction: 30 is not allowed; give a fraction in [0, 1]; did you mean "
        "0.3?",
    ),
    (
        {**RIGL, "param_filter": {"*": {"drop_fracton": 0.3}}},
        "sparsity.param_filter.*: the key 'drop_fracton' is not allowed; give a known key (did you mean "
        "drop_fraction?)",
    ),
    (
        {**RIGL, "param_filter": {"*": {"param_filter": "*"}}},
        "sparsity.param_filter.*: a param_filter inside param_filter is not allowed; give other options "
        "(example: {balance_out_groups: 12})",
    ),
    (
        {**RIGL, "params": 3},
        "sparsity.params: 3 is not allowed; give a dict of options",
    ),
    (
        {**RIGL, "params": {"sparsity": 0.5}},
        "sparsity: 'sparsity' both beside and inside `params` is not allowed; give it once",
    ),
    (
        {"groups": 3},
        "sparsity.groups: 3 is not allowed; give a list of dicts",
    ),
    (
        {"groups": []},
        "sparsity.groups: an empty list is not allowed; give at least one entry, or null for dense training",
    ),
    (
        {"groups": [RIGL], "seed": 1},
        "sparsity: the key 'seed' beside `groups` is not allowed; give it inside the entries of `groups`",
    ),
    (
        {"groups": [RIGL], "algorithm": "set"},
        "sparsity.algorithm: 'set' is not allowed; give group, and the algorithm inside each entry of `groups`",
    ),
    (
        {"groups": [RIGL], "type": None},
        "sparsity.type: null is not allowed; give group, and the algorithm inside each entry of `groups`",
    ),
    (
        {"groups": [RIGL, {"sparsity": 5}]},
        "sparsity.groups[1].sparsity: 5 is not allowed; give a fraction in [0, 1); did you mean 0.05?",
    ),
    (
        [RIGL, {"groups": [RIGL]}],
        "sparsity[1]: {'groups': [{'algorithm': 'rigl', 'sparsity': 0.9}]} is not allowed; give a dict of "
        "options (example: {algorithm: set, sparsity: 0.9})",
    ),
    (
        [RIGL, {**RIGL, "update": {"freq": 0}}],
        "sparsity[1].update.freq: 0 is not allowed; give a whole number of steps ≥ 1 (example: freq: 100)",
    ),
    (
        {**RIGL, "update": {"freq": 1, "stop": "75%"}},
        "sparsity.update.stop: '75%' is not allowed; give a whole number of steps; a percentage needs "
        "the length of the run, num_steps=1000 (example: 75)",
    ),
    (
        {"algorithm": WithOption, "sparsity": 0.5, "keep_rows": "bad"},
        "sparsity: WithOption: keep_rows is bad is not allowed; give options that its constructor takes",
    ),
    (
        {"algorithm": WithOption, "sparsity": 0.5, "keep_row": 1},
        "sparsity: the key 'keep_row' is not allowed; give a known key (did you mean keep_rows?)",
    ),
]


@pytest.mark.parametrize(("block", "message"), CASES, ids=[str(index) for index in range(len(CASES))])
def test_refusals_are_one_complete_line(block, message):
    assert refusal(block) == message


def test_a_percentage_above_the_whole_run():
    block = {**RIGL, "update": {"freq": 1, "stop": "175%"}}
    assert refusal(block, num_steps=10) == (
        'sparsity.update.stop: \'175%\' is not allowed; give at most "100%" (example: "75%")'
    )


def test_the_path_may_start_elsewhere():
    message = refusal([RIGL, {**RIGL, "seed": "x"}], path="trainer.init.sparsity")
    assert (
        message == "trainer.init.sparsity[1].seed: 'x' is not allowed; give a whole number (example: seed: 1)"
    )


def test_imports_can_be_refused():
    for option in ("algorithm", "init_method"):
        message = refusal({**RIGL, option: "math:pi"}, allow_imports=False)
        assert message == (
            f"sparsity.{option}: the import path 'math:pi' (imports are off) is not allowed; give a registered name"
        )


# ---- refusals that need the model: still before anything is built ----

OUT = "give a divisor of the 6 output features of 1.weight [6, 4]"
NEAR = "give a glob that matches; parameters with near names"


@pytest.mark.parametrize(
    ("block", "start"),
    [
        ({**RIGL, "balance_out_groups": 4}, f"sparsity.balance_out_groups: 4 is not allowed; {OUT}"),
        ([{**RIGL, "param_filter": "0.weight"}, {**RIGL, "balance_out_groups": 4}],
         f"sparsity[1].balance_out_groups: 4 is not allowed; {OUT}"),
        ({**RIGL, "param_filter": {"*.weight": {"balance_out_groups": 4}}},
         f"sparsity.param_filter.*.weight.balance_out_groups: 4 is not allowed; {OUT}"),
        ({**RIGL, "param_filter": "2.weight"},
         f"sparsity.param_filter: '2.weight' (it matches no parameter) is not allowed; {NEAR}: "),
        ({**RIGL, "param_filter": ["0.weight", "O.weight"]},
         f"sparsity.param_filter: 'O.weight' (it matches no parameter) is not allowed; {NEAR}: "),
        ({**RIGL, "param_filter": {"0.weight": None, "x": None}},
         f"sparsity.param_filter: 'x' (it matches no parameter) is not allowed; {NEAR}: "),
        ([{**RIGL, "param_filter": "0.weight"}, {**RIGL, "param_filter": "x"}],
         f"sparsity[1].param_filter: 'x' (it matches no parameter) is not allowed; {NEAR}: "),
    ],
)  # fmt: skip
def test_a_model_that_does_not_fit_is_left_untouched(block, start):
    model, before = two_layers(), set(two_layers().state_dict())
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError) as caught:
        configure(block).apply(model)
    assert str(caught.value).startswith(start)
    assert set(model.state_dict()) == before
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_a_directly_built_algorithm_names_the_option():
    with pytest.raises(ConfigError, match=r"^balance_out_groups: 4 is not allowed; "):
        RigL(0.5, balance_out_groups=4).apply(two_layers())
    with pytest.raises(ConfigError, match=r"^update\.freq: 0 is not allowed; "):
        RigL(0.5, update={"freq": 0})
