"""Where a weight may have compact storage: on the CPU, and blocks on a GPU that has kernels for them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from helpers import sparse_parameters
from rarefy.errors import ConfigError
from rarefy.filters import Place
from rarefy.kernels import gpu
from rarefy.storage import choice

GPU = torch.device("cuda", 0)
REFUSED = "give auto, which takes compact storage where it can"


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> nn.Linear:
    """A layer whose weight says that it is on a GPU with kernels."""
    monkeypatch.setattr(gpu, "obstacle", lambda device: "")
    layer = nn.Linear(32, 32)
    pretended = type("Pretended", (), {"device": GPU})()
    monkeypatch.setattr(layer, "parameters", lambda recurse=True: iter([pretended]))
    return layer


def test_blocks_on_a_gpu_with_kernels(on_a_gpu: nn.Linear) -> None:
    assert choice.obstacle([Place(on_a_gpu, "weight")], (16, 16)) == ""


@pytest.mark.parametrize(
    ("block", "found"),
    [
        (None, "it is on cuda:0"),
        ((4, 8), "it is on cuda:0, whose kernels take blocks with sides that are multiples of 8"),
    ],
)
def test_other_weights_on_a_gpu(on_a_gpu: nn.Linear, block: tuple[int, int] | None, found: str) -> None:
    assert choice.obstacle([Place(on_a_gpu, "weight")], block) == found


def test_a_gpu_without_kernels(on_a_gpu: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "obstacle", lambda device: f"{device} is too old")
    found = choice.obstacle([Place(on_a_gpu, "weight")], (16, 16))
    assert found == "it is on cuda:0, and cuda:0 is too old"


def test_other_devices_have_no_kernels() -> None:
    layer = nn.Linear(32, 32, device="meta")
    assert choice.obstacle([Place(layer, "weight")], (16, 16)) == "it is on meta"


def test_compact_is_taken_on_a_gpu_for_blocks_and_refused_for_single_connections(on_a_gpu: nn.Linear) -> None:
    blocks = rarefy.Static(0.5, pattern={"block": [16, 16]}, compute="compact")
    blocks.check(blocks.select(on_a_gpu))
    single = rarefy.Static(0.5, compute="compact")
    with pytest.raises(ConfigError, match=rf"^compute: compact for weight \(it is on cuda:0\) .* {REFUSED}"):
        single.check(single.select(on_a_gpu))


def test_auto_stays_masked_on_a_gpu(on_a_gpu: nn.Linear, monkeypatch: pytest.MonkeyPatch) -> None:
    # Even where the rule would expect a gain, as it does on the CPU.
    monkeypatch.setattr(choice, "timed", lambda layer: 0.1)
    sparsity = rarefy.Static(0.9, pattern={"block": [16, 16]}, distribution="uniform")
    sparsity.apply(on_a_gpu)
    sparsity.apply(torch.optim.AdamW([on_a_gpu.weight, on_a_gpu.bias], lr=0.1))
    assert [one.storage.kind for one in sparse_parameters(sparsity)] == ["masked"]
    monkeypatch.undo()
    monkeypatch.setattr(choice, "timed", lambda layer: 0.1)
    layer = nn.Linear(32, 32)
    sparsity = rarefy.Static(0.9, pattern={"block": [16, 16]})
    sparsity.apply(layer)
    sparsity.apply(torch.optim.AdamW(layer.parameters(), lr=0.1))
    assert [one.storage.kind for one in sparse_parameters(sparsity)] == ["compact"]
