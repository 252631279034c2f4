"""Layers so large that `auto` stores them compact, in the hands of code that knows nothing of sparsity."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy
import io
from functools import partial

import pytest
import torch
from torch import nn

import rarefy
from rarefy.kernels import instruction_set
from rarefy.tensors import SparseWeight

pytestmark = pytest.mark.skipif(
    instruction_set() in ("reference", "v2"), reason="auto never leaves masked storage here"
)


def prepare(algorithm="static", optimizer=torch.optim.AdamW, **changes):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512))
    sparsity = rarefy.configure({"algorithm": algorithm, "sparsity": 0.9, "seed": 1, **changes})
    sparsity.apply(model)
    trained_by = optimizer(model.parameters(), lr=1e-3)
    sparsity.apply(trained_by)
    assert {p.storage.kind for p in sparsity.parameters.values()} == {"compact"}
    return model, sparsity, trained_by


def learn(model, optimizer, step):
    optimizer.zero_grad()
    x = torch.randn(512, 512, generator=torch.Generator().manual_seed(step))
    (model(x) - x.roll(1, 1)).square().mean().backward()
    optimizer.step()


def dense(weight):
    return weight.detach().dense() if isinstance(weight, SparseWeight) else weight.detach().clone()


@pytest.mark.parametrize("algorithm", ["static", "set"])
def test_an_average_written_through_the_state_dict(algorithm):
    model, _, optimizer = prepare(algorithm)
    average = copy.deepcopy(model)
    expected = dense(model[0].weight)
    for step in range(3):
        learn(model, optimizer, step)
        expected = 0.5 * expected + 0.5 * dense(model[0].weight)
        with torch.no_grad():
            for key, value in average.state_dict().items():
                if value.dtype.is_floating_point:
                    value *= 0.5
                    value += 0.5 * model.state_dict()[key]
    torch.testing.assert_close(dense(average[0].weight), expected)


@pytest.mark.parametrize("algorithm", ["static", "set"])
def test_a_target_network_updated_over_its_parameters(algorithm):
    model, _, optimizer = prepare(algorithm)
    target = copy.deepcopy(model)
    expected = dense(model[0].weight)
    for step in range(3):
        learn(model, optimizer, step)
        expected = 0.9 * expected + 0.1 * dense(model[0].weight)
        for one, other in zip(model.parameters(), target.parameters(), strict=True):
            other.data.copy_(0.1 * one.data + 0.9 * other.data)
    torch.testing.assert_close(dense(target[0].weight), expected)
    x = torch.randn(3, 512)
    torch.testing.assert_close(target[0](x), x @ expected.t() + target[0].bias)


def test_clipped_weights():
    model, _, optimizer = prepare()
    learn(model, optimizer, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.clamp_(-0.001, 0.001)
    assert float(model[0].weight.detach().abs().max()) <= 0.00101


def test_initialisers():
    model, sparsity, _ = prepare()
    mask = sparsity.parameters["0.weight"].mask
    nn.init.constant_(model[0].weight, 0.5)
    assert torch.equal(dense(model[0].weight), 0.5 * mask)
    model.apply(lambda module: nn.init.zeros_(module.weight) if isinstance(module, nn.Linear) else None)
    assert not model[0].weight.any() and not model[2].weight.any()


def test_a_merged_adapter():
    model, sparsity, _ = prepare()
    before, mask = dense(model[0].weight), sparsity.parameters["0.weight"].mask
    update = torch.randn(512, 4) @ torch.randn(4, 512)
    model[0].weight.data += update
    torch.testing.assert_close(dense(model[0].weight), (before + update) * mask)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["0.weight"], dense(model[0].weight))


def test_a_replaced_parameter_is_followed():
    model, sparsity, _ = prepare()
    model[0].weight = nn.Parameter(torch.ones(512, 512))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsity.apply(optimizer)
    learn(model, optimizer, 0)
    mask = sparsity.parameters["0.weight"].mask
    assert type(model[0].weight) is SparseWeight and not dense(model[0].weight)[~mask].any()


def test_an_assigned_state_dict_is_followed():
    model, sparsity, optimizer = prepare()
    learn(model, optimizer, 0)
    state = {key: value.clone() for key, value in dict(model.state_dict()).items()}
    model.load_state_dict({key: torch.as_tensor(dense(value)) for key, value in state.items()}, assign=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    sparsity.apply(optimizer)
    learn(model, optimizer, 1)
    assert type(model[0].weight) is SparseWeight
    assert not dense(model[0].weight)[~sparsity.parameters["0.weight"].mask].any()


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adafactor, partial(torch.optim.LBFGS, max_iter=4), torch.optim.RMSprop]
)
def test_other_optimizers_with_explicit_compact_storage(optimizer):
    found = []
    for compute in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)).double()
        sparsity = rarefy.configure({"sparsity": 0.8, "seed": 1, "compute": compute})
        sparsity.apply(model)
        trained_by = optimizer(model.parameters(), lr=1e-2)
        sparsity.apply(trained_by)
        for step in range(4):
            x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step)).double()

            def closure(model=model, trained_by=trained_by, x=x):
                trained_by.zero_grad()
                loss = (model(x) - x[:, :8]).square().mean()
                loss.backward()
                return loss

            trained_by.step(closure)
        found.append([dense(parameter) for parameter in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_transformer_encoder_in_evaluation_with_padding():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(512, 8, 512, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 1)
    sparsity = rarefy.configure({"sparsity": 0.9, "seed": 1})
    sparsity.apply(encoder)
    sparsity.apply(torch.optim.AdamW(encoder.parameters()))
    assert "compact" in {p.storage.kind for p in sparsity.parameters.values()}
    x, padding = torch.randn(2, 6, 512), torch.zeros(2, 6, dtype=torch.bool)
    padding[:, 4:] = True
    trained = encoder(x, src_key_padding_mask=padding).detach()
    with torch.no_grad():
        evaluated = encoder.eval()(x, src_key_padding_mask=padding)
    torch.testing.assert_close(evaluated[:, :4], trained[:, :4])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_dynamic_quantisation():
    model, _, _ = prepare()
    x = torch.randn(4, 512)
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
    assert "dynamic" in type(quantised[0]).__module__
    torch.testing.assert_close(quantised(x), model(x), rtol=0.1, atol=0.05)


def test_transforms():
    model, _, _ = prepare()
    x = torch.randn(3, 512)
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    twin = rarefy.finalize(copy.deepcopy(model))
    torch.testing.assert_close(torch.func.jacrev(model)(x[0]), torch.func.jacrev(twin)(x[0]))


def test_a_copy_made_under_inference_mode():
    model, _, _ = prepare()
    with torch.inference_mode():
        copied = copy.deepcopy(model)
        assert torch.equal(copied(torch.ones(1, 512)), model(torch.ones(1, 512)))


@pytest.mark.parametrize("order", ["model first", "optimizer first"])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.Adagrad])
def test_an_optimizer_that_has_state_before(order, optimizer):
    found = []
    for compute in ("masked", "compact"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(32, 64))
        trained_by = optimizer(model.parameters(), lr=1e-2)
        model(torch.ones(4, 32)).sum().backward()
        trained_by.step()
        sparsity = rarefy.configure({"sparsity": 0.8, "seed": 1, "compute": compute})
        for target in (model, trained_by) if order == "model first" else (trained_by, model):
            sparsity.apply(target)
        for step in range(3):
            trained_by.zero_grad()
            model(torch.full((4, 32), float(step + 1))).square().mean().backward()
            trained_by.step()
        found.append(dense(model[0].weight))
    torch.testing.assert_close(found[1], found[0])
