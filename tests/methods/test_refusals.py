"""Options of single methods that are refused, each in one line that says what to give."""

from __future__ import annotations

import pytest

import rarefy
from rarefy.errors import ConfigError

CASES = [
    (
        {"algorithm": "top_kast", "sparsity": 0.8, "forward_sparsity": 0.5},
        "sparsity.forward_sparsity: 0.5 is not allowed; give at least the sparsity, 0.8: forward passes use a part of "
        "what is trained (example: forward_sparsity: 0.9)",
    ),
    (
        {"algorithm": "top_kast", "sparsity": 0.8},
        "sparsity.forward_sparsity: a missing value is not allowed; give what top_kast needs: fraction of connections "
        "that forward passes, and the finished model, leave out; larger than `sparsity`",
    ),
    (
        {"algorithm": "top_kast", "sparsity": 0.5, "forward_sparsity": 0.75, "pattern": {"n": 1, "m": 2}},
        "sparsity.pattern: {n: 1, m: 2} is not allowed; give an n of at least 2 for top_kast: forward passes use one "
        "of them, candidates are beside it (example: pattern: {n: 2, m: 4})",
    ),
    (
        {"algorithm": "ac_dc", "sparsity": 0.5, "update": {"freq": 100}},
        "sparsity.update: no end of the phases for ac_dc is not allowed; give {freq, start, stop} or {steps: [...]}; "
        'what follows the last of them stays sparse (example: update: {freq: 500, start: 1000, stop: "75%"})',
    ),
    (
        {"algorithm": "ac_dc", "sparsity": [0.5, 0.6], "update": {"freq": 1, "stop": 9}},
        "sparsity.sparsity: a schedule is not allowed; give a number in [0, 1) for ac_dc, or algorithm: gmp (example: "
        "sparsity: 0.9)",
    ),
    (
        {
            "algorithm": "ac_dc",
            "sparsity": 0.9,
            "update": {"freq": 1, "stop": 9},
            "pattern": {"n": 2, "m": 4},
        },
        "sparsity.sparsity: 0.9 is not allowed; give 0.5, which is 1 − n/m for {n: 2, m: 4}",
    ),
    (
        {"algorithm": "granet", "sparsity": 0.5},
        "sparsity.sparsity: the constant 0.5 is not allowed; give a schedule for granet, or algorithm: static "
        "(example: sparsity: {type: polynomial, init: 0, final: 0.9, start: 0, stop: 5000})",
    ),
    (
        {"algorithm": "srigl", "sparsity": 0.5, "pattern": {"n": 2, "m": 4}},
        "sparsity.pattern: {'n': 2, 'm': 4} is not allowed; give fan_in for srigl (example: pattern: fan_in)",
    ),
    (
        {"algorithm": "srigl", "sparsity": 0.5, "min_salient": 2},
        "sparsity.min_salient: 2 is not allowed; give a fraction in [0, 1]; did you mean 0.02?",
    ),
]


@pytest.mark.parametrize(("block", "message"), CASES, ids=[str(index) for index in range(len(CASES))])
def test_refusals_are_one_complete_line(block, message):
    with pytest.raises(ConfigError) as caught:
        rarefy.configure(block)
    assert str(caught.value) == message
