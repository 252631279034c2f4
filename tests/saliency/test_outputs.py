"""Which layer computes a model's output, and hooks that go again."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.saliency.outputs import divided_by, hooked, output_layer


def test_the_last_layer_with_a_matrix_that_was_called():
    model = nn.Sequential(nn.Linear(2, 3), nn.Embedding(4, 4), nn.Conv1d(1, 2, 1), nn.ReLU())
    x = torch.ones(1, 2)
    assert output_layer(model, lambda: model[2](model[0](x).unsqueeze(1))) is model[2]
    assert output_layer(model, lambda: model[0](x)) is model[0]
    assert output_layer(model, lambda: None, "3") is model[3]


def test_no_such_layer():
    model = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(
        RarefyError, match=r"no layer with a weight matrix was called; name the one with output:"
    ):
        output_layer(model, lambda: None)
    with pytest.raises(RarefyError, match=r"output: there is no module 'head'; give a module"):
        output_layer(model, lambda: None, "head")


def test_hooks_go_after_an_error():
    layer = nn.Linear(2, 2)
    with pytest.raises(ValueError), hooked({layer: divided_by(2.0)}):
        assert torch.equal(layer(torch.ones(1, 2)) * 2, layer.weight.sum(1)[None] + layer.bias)
        raise ValueError
    assert torch.equal(
        layer(torch.ones(1, 2)), nn.functional.linear(torch.ones(1, 2), layer.weight, layer.bias)
    )
