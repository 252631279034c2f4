"""The decoder family against numbers that the Model Zoo's own models computed (`reference_values.json`)."""

import json
from pathlib import Path

import pytest
import torch

from rarefy.models import build_model

CASES = json.loads((Path(__file__).parent / "reference_values.json").read_text())["cases"]


def set_weights(model):
    """Parameter i in sorted order gets 0.1 · sin(0.37 n + i) at entry n, plus 1 where it is a norm's weight."""
    parameters = dict(model.named_parameters())
    for index, name in enumerate(sorted(parameters)):
        parameter = parameters[name]
        entries = 0.1 * torch.sin(0.37 * torch.arange(parameter.numel(), dtype=torch.float64) + index)
        is_gain = name.endswith("weight") and ("norm" in name or "ln_f" in name)
        with torch.no_grad():
            parameter.copy_((entries + is_gain).reshape(parameter.shape))
    return parameters


def batch():
    tokens = (37 * torch.arange(66) % 251).reshape(2, 33)
    mask = torch.ones(2, 32, dtype=torch.int32)
    mask[1, 24:] = 0
    return {"input_ids": tokens[:, :-1], "labels": tokens[:, 1:], "attention_mask": mask}


@pytest.mark.parametrize("case", CASES)
def test_names_shapes_loss_and_gradients(case):
    expected = CASES[case]
    model = build_model(expected["model"])
    parameters = set_weights(model)
    shapes = {name.removeprefix("model."): list(p.shape) for name, p in parameters.items()}
    assert shapes == {name: shape for name, (shape, _) in expected["parameters"].items()}
    loss = model(batch())
    assert float(loss.detach()) == pytest.approx(expected["loss"], rel=2e-4)
    loss.backward()
    for name, (_, norm) in expected["parameters"].items():
        parameter = parameters[f"model.{name}"]
        if norm is None:
            assert not parameter.requires_grad
        else:
            assert float(parameter.grad.norm()) == pytest.approx(norm, rel=2e-3, abs=1e-6), name


@pytest.mark.parametrize("case", CASES)
def test_initialisation_and_a_double_copy_agree_with_the_first_forward_pass(case):
    torch.manual_seed(0)
    model = build_model(CASES[case]["model"]).eval()
    outputs = model(batch())
    assert bool(torch.isfinite(outputs.loss))
    doubled = model.double()(batch())
    torch.testing.assert_close(outputs.loss, doubled.loss.float(), rtol=1e-4, atol=1e-5)
