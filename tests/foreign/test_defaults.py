"""Settings of the whole process: the default device and dtype, and deterministic algorithms, play no part."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from foreign.networks import NEEDS_NO_DEFAULT_DEVICE
from rarefy.kernels import instruction_set

IS_FAST = instruction_set() not in ("reference", "v2")


def trained(algorithm, compute, dtype):
    """Mask and weight after three steps of a layer so large that `auto` stores it compact."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 512, device="cpu", dtype=dtype)
    update = {"update": {"freq": 1}} if algorithm != "static" else {}
    sparsity = rarefy.configure(
        {"algorithm": algorithm, "sparsity": 0.95, "seed": 0, "compute": compute, **update}
    )
    sparsity.apply(layer)
    # The smallest number of AdamW is zero in half precision.
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.9)
    sparsity.apply(optimizer)
    x = (
        torch.linspace(-1, 1, 64 * 512, device="cpu", dtype=torch.float32)
        .view(64, 512)
        .sin()
        .to(layer.weight.dtype)
    )
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - x.roll(1, 1)).square().mean().backward()
        optimizer.step()
    [parameter] = sparsity.parameters.values()
    return parameter.storage.kind, parameter.mask.clone(), parameter.dense_weight().clone()


@pytest.fixture
def process():
    """Puts the settings back."""
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)


SETTINGS = {
    "meta": lambda: torch.set_default_device("meta"),
    "float64": lambda: torch.set_default_dtype(torch.float64),
    "bfloat16": lambda: torch.set_default_dtype(torch.bfloat16),
    "deterministic": lambda: torch.use_deterministic_algorithms(True),
}


@NEEDS_NO_DEFAULT_DEVICE
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("algorithm", ["static", "set", "rigl"])
@pytest.mark.parametrize("compute", ["masked", "compact", "auto"])
def test_settings_of_the_process_play_no_part(setting, algorithm, compute, process):
    kind, mask, weight = trained(algorithm, compute, torch.float32)
    assert not IS_FAST or kind == ("masked" if compute == "masked" else "compact")
    SETTINGS[setting]()
    found = trained(algorithm, compute, torch.float32)
    assert found[0] == kind and torch.equal(found[1], mask) and torch.equal(found[2], weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute", ["masked", "compact", "auto"])
def test_a_model_in_the_default_dtype(dtype, compute, process):
    torch.set_default_dtype(dtype)
    kind, mask, weight = trained("set", compute, None)
    assert weight.dtype == dtype and not weight[~mask].any() and kind in ("masked", "compact")
    assert weight.isfinite().all() and int(mask.sum()) == int(0.05 * 512 * 512)
