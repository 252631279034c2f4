"""SynFlow's scores, against products of positive matrices by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import RarefyError
from rarefy.saliency.synflow import SynapticFlow, first_sample, ones_like, round_sparsity


def call(model: nn.Module, batch: Any) -> Any:
    return model(batch)


@settings(max_examples=20, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_products_of_positive_matrices(sizes, seed):
    torch.manual_seed(seed)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    model = nn.Sequential(*[part for layer in layers for part in (layer, nn.ReLU())])
    weights = {f"{2 * i}.weight": layer.weight for i, layer in enumerate(layers)}
    flow = SynapticFlow(model, torch.randn(3, sizes[0]), layers[-1], call)
    scores = flow.scores(weights)
    positive = [layer.weight.detach().abs().double() for layer in layers]
    for index, (name, score) in enumerate(scores.items()):
        before = torch.ones(sizes[0], dtype=torch.float64)
        for matrix in positive[:index]:
            before = matrix @ before
        after = torch.ones(sizes[-1], dtype=torch.float64)
        for matrix in reversed(positive[index + 1 :]):
            after = after @ matrix
        torch.testing.assert_close(score, positive[index] * after[:, None] * before[None], msg=name)


def test_the_flow_into_a_neuron_is_the_flow_out_of_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 3))
    flow = SynapticFlow(model, torch.ones(1, 5), model[3], call)
    scores = flow.scores({"0.weight": model[0].weight, "3.weight": model[3].weight})
    torch.testing.assert_close(scores["0.weight"].sum(1), scores["3.weight"].sum(0))


def test_norms_only_scale_and_batch_norms_divide_by_what_they_saw():
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    norm.running_var.copy_(torch.tensor([1.0, 4.0, 9.0, 16.0]))
    nn.init.constant_(norm.weight, -2.0)
    nn.init.constant_(norm.bias, 5.0)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 1)).eval()
    flow = SynapticFlow(model, torch.ones(1, 3), model[2], call)
    found = flow.scores({"2.weight": model[2].weight})["2.weight"]
    inside = (
        model[0].weight.detach().abs().double().sum(1) * 2 / (norm.running_var.double() + norm.eps).sqrt()
    )
    torch.testing.assert_close(found, model[2].weight.detach().abs().double() * inside)
    assert norm.running_var.dtype == torch.float32


def test_tokens_are_ones_behind_their_embedding():
    model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2))
    flow = SynapticFlow(model, torch.tensor([[3, 1, 2]]), model[1], call)
    found = flow.scores({"1.weight": model[1].weight})["1.weight"]
    torch.testing.assert_close(found, 3 * model[1].weight.detach().abs().double())


def test_what_cannot_flow():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(RarefyError, match=r"synflow: the output does not depend on 1\.weight; leave it out"):
        SynapticFlow(model, torch.ones(1, 2), model[0], call).scores({"1.weight": model[1].weight})
    with pytest.raises(RarefyError, match="synflow: the output layer was not called; name it with output:"):
        SynapticFlow(model, torch.ones(1, 2), nn.Linear(2, 2), call).scores({"1.weight": model[1].weight})
    with pytest.raises(RarefyError, match="too large for float64"):
        huge = {"0.weight": torch.full((2, 2), 1e308, dtype=torch.float64)}
        SynapticFlow(model, torch.ones(1, 2), model[1], call).scores(
            {**huge, "1.weight": torch.full((2, 2), 1e38)}
        )
    single = nn.Sequential(nn.Linear(2, 2), nn.Flatten())
    refuses = lambda model, batch: model(batch.float())  # noqa: E731
    with pytest.raises(
        RarefyError, match=r"synflow computes in float64, which this model cannot \(.*\); take snip"
    ):
        SynapticFlow(single, torch.ones(1, 2), single[0], refuses).scores({"0.weight": single[0].weight})


def test_densities_fall_exponentially():
    shares = [1 - round_sparsity(0.99, turn, 100) for turn in range(1, 101)]
    assert shares[-1] == pytest.approx(0.01, abs=1e-12)
    assert all(b / a == pytest.approx(0.01**0.01) for a, b in pairwise(shares))
    assert round_sparsity(1.0, 3, 3) == 1.0


def test_shapes_of_a_batch():
    batch = {"x": torch.zeros(4, 2), "y": (torch.zeros(4), "text")}
    assert first_sample(batch)["x"].shape == (1, 2) and first_sample(batch)["y"][0].shape == (1,)
    uneven = [torch.zeros(4), torch.zeros(3)]
    assert first_sample(uneven) is uneven
    assert ones_like([torch.zeros(1), torch.tensor([7])])[1].item() == 7
