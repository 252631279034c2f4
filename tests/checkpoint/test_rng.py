"""Generators go on exactly where they were captured."""

import random

import numpy as np
import torch

from rarefy.checkpoint import rng
from rarefy.checkpoint.directory import CheckpointParts, load, save


def draw():
    values = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    return [*values, *torch.rand(3).tolist(), *torch.randn(5).tolist()]


def test_restore_repeats_the_same_numbers():
    states = rng.capture()
    first, later = draw(), draw()
    rng.restore(states)
    assert [draw(), draw()] == [first, later]


def test_a_spare_gauss_number_is_kept():
    random.seed(1)
    np.random.seed(1)
    random.gauss(0, 1)
    np.random.randn()
    states = rng.capture()
    expected = random.gauss(0, 1), np.random.randn(), random.gauss(0, 1), np.random.randn()
    draw()
    rng.restore(states)
    assert (random.gauss(0, 1), np.random.randn(), random.gauss(0, 1), np.random.randn()) == expected


def test_states_survive_a_checkpoint(tmp_path):
    path = save(tmp_path, 1, CheckpointParts(model={}, rng=rng.capture()))
    expected = draw()
    rng.restore(load(path).rng)
    assert draw() == expected


def test_what_was_not_captured_is_left_alone():
    states = rng.capture()
    expected = draw()
    rng.restore(states)
    rng.restore({})
    assert draw() == expected
