"""Balanced groups and n:m find outputs and inputs in weights that hold them the other way round, or refuse."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rarefy
from rarefy.errors import ConfigError


def trained_mask(module, x, algorithm="rigl", **options):
    """The mask after two updates; masks obey the pattern after the first one and after updates alike."""
    torch.manual_seed(0)
    block = {"algorithm": algorithm, "sparsity": 0.75, "drop_fraction": 0.6, "update": {"freq": 1}, "seed": 0}
    sparsity = rarefy.configure({**block, "compute": "masked", **options})
    sparsity.apply(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()
    assert rarefy.summary(sparsity).actual_sparsity == pytest.approx(options.get("sparsity", 0.75))
    return module.weight_mask


def conv1d(outputs, inputs):
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(outputs, inputs)


CASES = {
    "linear": (lambda: nn.Linear(32, 64), torch.randn(4, 32), 0),
    "conv": (lambda: nn.Conv2d(32, 64, 3), torch.randn(2, 32, 5, 5), 0),
    "transposed conv": (lambda: nn.ConvTranspose2d(32, 64, 3), torch.randn(2, 32, 5, 5), 1),
    "Conv1D": (lambda: conv1d(64, 32), torch.randn(4, 32), 1),
}


@pytest.mark.parametrize("algorithm", ["rigl", "set"])
@pytest.mark.parametrize("key", ["balance_out_groups", "balance_in_groups"])
@pytest.mark.parametrize("case", CASES)
def test_balanced_groups_are_of_the_side_that_was_asked_for(case, key, algorithm):
    make, x, outputs = CASES[case]
    mask = trained_mask(make(), x, algorithm, **{key: 4})
    axis = outputs if key == "balance_out_groups" else 1 - outputs
    counts = mask.movedim(axis, 0).reshape(4, -1).sum(1)
    assert len(set(counts.tolist())) == 1
    across = mask.movedim(1 - axis, 0).reshape(4, -1).sum(1)
    assert len(set(across.tolist())) > 1


@pytest.mark.parametrize("case", CASES)
def test_n_of_m_counts_the_inputs_of_an_output(case):
    make, x, outputs = CASES[case]
    mask = trained_mask(make(), x, pattern={"n": 1, "m": 4})
    inputs_last = mask.movedim(1 - outputs, -1)
    assert (inputs_last.unflatten(-1, (-1, 4)).sum(-1) == 1).all()
    assert not (mask.movedim(outputs, -1).unflatten(-1, (-1, 4)).sum(-1) == 1).all()


@pytest.mark.parametrize("case", CASES)
def test_blocks_are_outputs_by_inputs(case):
    make, x, outputs = CASES[case]
    mask = trained_mask(make(), x, pattern={"block": [8, 2]})
    turned = mask.movedim(outputs, 0)
    blocks = turned.unflatten(1, (-1, 2)).unflatten(0, (-1, 8)).float().mean((1, 3))
    assert set(blocks.flatten().tolist()) == {0.0, 1.0}


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (nn.Conv2d(32, 64, 3, groups=4), {"balance_in_groups": 4}),
        (nn.ConvTranspose2d(32, 64, 3, groups=4), {"balance_out_groups": 4}),
        (nn.Conv2d(32, 32, 3, groups=32), {"pattern": {"n": 1, "m": 4}}),
        (nn.ConvTranspose2d(8, 16, 3, groups=4), {"pattern": {"n": 1, "m": 4}}),
        (nn.Conv2d(32, 64, 3, groups=32), {"pattern": {"block": [4, 1]}}),
        (nn.Conv2d(8, 8, 1, groups=2), {"pattern": "diagonal"}),
        (nn.ConvTranspose2d(8, 16, 3, groups=2), {"pattern": "diagonal"}),
    ],
)
def test_what_groups_of_a_convolution_do_not_allow_is_refused(module, options):
    with pytest.raises(ConfigError, match="group"):
        rarefy.configure({"sparsity": 0.75, **options}).apply(module)
    assert not hasattr(module, "weight_mask")


@pytest.mark.parametrize(
    ("module", "options"),
    [
        (nn.Conv2d(32, 64, 3, groups=4), {"balance_out_groups": 4}),
        (nn.ConvTranspose2d(32, 64, 3, groups=4), {"balance_in_groups": 4}),
        (nn.Conv2d(32, 64, 3, groups=4), {"pattern": {"n": 1, "m": 4}}),
        (nn.ConvTranspose2d(32, 64, 3, groups=4), {"pattern": {"n": 1, "m": 4}}),
    ],
)
def test_what_they_do_allow_is_taken(module, options):
    mask = trained_mask(module, torch.randn(2, 32, 5, 5), **options)
    assert float(mask.float().mean()) == 0.25


def test_experts_of_unknown_layout_are_refused_for_patterns_alone():
    transformers = pytest.importorskip("transformers", minversion="5")
    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=4,
    )  # fmt: skip
    layer = transformers.MixtralForCausalLM(config)
    with pytest.raises(
        ConfigError, match=r"not known which dimension of a MixtralExperts's weight is the output"
    ):
        rarefy.configure({"sparsity": 0.75, "pattern": {"n": 1, "m": 4}, "param_filter": "*experts*"}).apply(
            layer
        )
    sparsity = rarefy.configure({"sparsity": 0.75, "param_filter": "*experts*proj"})
    sparsity.apply(layer)
    assert rarefy.summary(sparsity).actual_sparsity == 0.75
