"""What SynFlow takes a normalization to multiply with, of torch's and of others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.saliency.synflow import SynapticFlow


class OwnNorm(nn.Module):
    """Root mean square, scaled by an offset plus the weight; `power` 1 is something else."""

    def __init__(self, weight: torch.Tensor, offset: float, power: int = 2) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.offset = offset
        self.power = power

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        mean = wide.abs().pow(self.power).mean(-1, keepdim=True).pow(1 / self.power)
        return (wide / (mean + 1e-6) * (self.offset + self.weight)).type_as(x)


class Centred(nn.LayerNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)


class Gated(nn.RMSNorm):
    def forward(self, x: torch.Tensor, gate: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x)


def through(norm: nn.Module) -> torch.Tensor:
    """What flows through a norm into each input of the layer behind it, for ones."""
    model = nn.Sequential(norm, nn.Linear(3, 1, bias=False))
    nn.init.ones_(model[1].weight)
    flow = SynapticFlow(model, torch.ones(1, 3), model[1], lambda model, batch: model(batch))
    return flow.scores({"1.weight": model[1].weight})["1.weight"].flatten()


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(
    "weight", [[0.0, -0.25, -3.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [200.0, -200.0, 1.0]]
)
def test_norms_that_scale_by_one_more(weight, offset):
    found = through(OwnNorm(torch.tensor(weight), offset))
    assert found.tolist() == [abs(offset + one) for one in weight]


def test_a_centred_norm_that_scales_by_one_more():
    norm = Centred(3)
    nn.init.constant_(norm.weight, -0.25)
    assert through(norm).tolist() == [0.75] * 3


@pytest.mark.parametrize("norm", [OwnNorm(torch.ones(3), 0.5), OwnNorm(torch.ones(3), 0.0, 1), Gated(3)])
def test_a_norm_of_another_kind_is_refused_by_name(norm):
    name = type(norm).__name__
    with pytest.raises(
        RarefyError, match=f"synflow cannot tell what 0, a {name}, multiplies with; take snip"
    ):
        through(norm)


def test_a_norm_that_is_called_by_keywords_is_refused():
    model = nn.Sequential(nn.LayerNorm(3), nn.Linear(3, 1))
    flow = SynapticFlow(model, torch.ones(1, 3), model[1], lambda model, x: model[1](model[0](input=x)))
    with pytest.raises(RarefyError, match="synflow cannot tell what 0, a LayerNorm, multiplies with"):
        flow.scores({"1.weight": model[1].weight})
