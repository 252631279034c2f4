"""Operations of a forward pass, against torch's own counter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from rarefy.callbacks.flops import ForwardFlops

MODELS = {
    "convolutions": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3)),
        (2, 4, 9, 9),
    ),
    "linear": (lambda: nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3)), (5, 7, 8)),
    "transformer": (lambda: nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1), (5, 2, 16)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_total_is_that_of_torch(name):
    build, shape = MODELS[name]
    model, x = build(), torch.randn(shape)
    torch.manual_seed(0)
    with ForwardFlops(model) as flops:
        counted = model(x)
    torch.manual_seed(0)
    with FlopCounterMode(display=False) as counter:
        expected = model(x)
    assert sum(flops.by_parameter.values()) + flops.other == counter.get_total_flops() > 0
    assert torch.equal(counted, expected)
    assert set(flops.by_parameter) <= dict(model.named_parameters()).keys()


def test_operations_belong_to_the_weight():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 2))
    model.append(model[1])
    with ForwardFlops(model) as flops:
        model[1](model[1](model[0](torch.ones(3, 8)).matmul(torch.ones(4, 4))).matmul(torch.ones(2, 4)))
    assert flops.by_parameter == {"0.weight": 2 * 3 * 32, "1.weight": 2 * 2 * 3 * 8}
    assert flops.other == 2 * 3 * 16 + 2 * 3 * 8


def test_a_product_with_a_parameter_is_its_own():
    weight = nn.ParameterDict({"w": torch.ones(4, 2), "b": torch.ones(2)})
    with ForwardFlops(weight) as flops:
        torch.addmm(weight["b"], torch.ones(3, 4), weight["w"])
        torch.ones(3, 4) @ weight["w"]
    assert flops.by_parameter == {"w": 2 * (2 * 3 * 2 * 4)} and flops.other == 0


def test_a_product_with_a_view_of_a_parameter_is_its_own():
    weight = nn.ParameterDict({"w": torch.ones(2, 4), "experts": torch.ones(3, 2, 4)})
    with ForwardFlops(weight) as flops:
        torch.ones(3, 4) @ weight["w"].t()
        weight["w"].view(4, 2).t() @ torch.ones(4, 5)
        F.linear(torch.ones(6, 4), weight["experts"][1])
    assert flops.by_parameter == {"w": 2 * (3 + 5) * 8, "experts": 2 * 6 * 8} and flops.other == 0


def test_attention_counts_scores_and_mixing():
    query, key = torch.ones(2, 4, 5, 8), torch.ones(2, 4, 7, 8)
    with ForwardFlops(nn.Linear(1, 1)) as flops:
        F.scaled_dot_product_attention(query, key, key)
    assert flops.other == 2 * 2 * 4 * 5 * 7 * (8 + 8)


def test_a_call_in_another_form_is_left_out_and_not_disturbed():
    layer = nn.Linear(2, 2)
    with ForwardFlops(layer) as flops:
        result = F.scaled_dot_product_attention(query=(x := torch.ones(1, 2, 2)), key=x, value=x)
        torch.matmul(input=x, other=x)
    assert result.shape == x.shape and flops.by_parameter == {}
