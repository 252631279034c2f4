"""`rarefy.prune`: every method, layer by layer where the method is, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import rarefy
from rarefy.errors import ConfigError, RarefyError
from rarefy.masks import keep_top_in_rows
from rarefy.models import build_model
from rarefy.pruning.hessians import Hessians
from rarefy.pruning.one_shot import METHODS, prune
from rarefy.pruning.stages import Walk, merged
from rarefy.saliency.sparse_gpt import sparse_gpt

GPT = {"name": "gpt2", "vocab_size": 32, "hidden_size": 16, "num_heads": 2, "num_hidden_layers": 3}
GPT |= {"filter_size": 32, "max_position_embeddings": 16}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def batches() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(9, 8, generator=generator), torch.randint(4, (9,), generator=generator))
        for _ in range(3)
    ]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_a_plain_model_with_zeros(method):
    model = make_model()
    model[1].eval()
    before = copy.deepcopy(model)
    done = prune(model, 0.5, method=method, batches=batches(), loss=loss)
    assert list(model.state_dict()) == list(before.state_dict())
    assert [(one.name, one.shape) for one in done.weights] == [
        ("0.weight", (16, 8)), ("3.weight", (12, 16)), ("5.weight", (4, 12)),
    ]  # fmt: skip
    for name, mask in done.masks.items():
        weight = model.get_parameter(name)
        assert not weight[~mask].any()
        assert method == "sparsegpt" or torch.equal(weight[mask], before.get_parameter(name)[mask])
    assert done.sparsity == pytest.approx(0.5, abs=0.02)
    others = set(before.state_dict()) - set(done.masks)
    assert all(torch.equal(before.state_dict()[name], model.state_dict()[name]) for name in others)
    assert [module.training for module in model.modules()] == [module.training for module in before.modules()]
    expected = torch.stack([loss(before.eval(), batch).detach() for batch in batches()]).mean()
    assert done.loss_before == pytest.approx(float(expected), rel=1e-6)
    after = torch.stack([loss(model.eval(), batch).detach() for batch in batches()]).mean()
    assert done.loss_after == pytest.approx(float(after), rel=1e-6)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_what_a_layer_is_given_comes_from_pruned_layers(method):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 12)).double()
    model = copy.deepcopy(layers)
    x = torch.randn(64, 8).double()
    done = prune(model, 0.5, method=method, batches=[x[:32], x[32:]])
    inputs = x
    for index in (0, 2):
        weight = layers[index].weight.detach()
        if method == "wanda":
            mask = keep_top_in_rows(weight.abs() * inputs.norm(dim=0), weight.shape[1] // 2)
            expected = weight * mask
        else:
            expected, mask = sparse_gpt(weight, inputs.t() @ inputs, 0.5)
        assert torch.equal(done.masks[f"{index}.weight"], mask)
        torch.testing.assert_close(model[index].weight.detach(), expected)
        inputs = torch.relu(nn.functional.linear(inputs, expected, layers[index].bias.detach()))


@pytest.mark.parametrize("pattern", ["unstructured", {"n": 2, "m": 4}])
@pytest.mark.parametrize("distribution", ["uniform", "erk"])
def test_on_the_calibration_loss(pattern, distribution):
    """Of the outputs of one layer, which is what SparseGPT minimizes."""
    if pattern != "unstructured" and distribution != "uniform":
        pytest.skip("n of m is uniform")
    torch.manual_seed(1)
    x = torch.randn(400, 8) @ torch.randn(8, 128) + torch.randn(400, 128)
    first = nn.Linear(128, 16)
    errors = {}
    for method in ("magnitude", "wanda", "sparsegpt"):
        layer = copy.deepcopy(first)
        prune(layer, 0.5, method=method, batches=[x], pattern=pattern, distribution=distribution)
        errors[method] = float((layer(x) - first(x)).square().mean().detach())
    assert errors["sparsegpt"] <= errors["wanda"] and errors["sparsegpt"] <= errors["magnitude"]


def tokens() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(32, (4, 2, 9), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": one[:, :-1], "labels": one[:, 1:]} for one in ids]


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "magnitude"])
def test_a_decoder(method):
    torch.manual_seed(0)
    model = build_model(GPT)
    heard: list[tuple[int, int]] = []
    done = prune(model, 0.5, method=method, batches=tokens(), progress=lambda *at: heard.append(at))
    assert done.loss_before is not None and done.loss_after is not None and len(done.weights) == 18
    assert heard == ([] if method == "magnitude" else [(0, 3), (1, 3), (2, 3), (3, 3)])


def test_stages_are_entries_of_the_list_of_layers_and_end_early():
    torch.manual_seed(0)
    model = build_model(GPT).eval()
    names = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    walk = Walk(model, names, tokens(), lambda model, batch: model(batch))
    assert [len(stage) for stage in walk.stages] == [6, 6, 6, 1]
    called: list[str] = []
    handle = model.model.lm_head.register_forward_hook(lambda *_: called.append("head"))
    seen: list[str] = []
    walk.show(walk.stages[0], lambda name, module, x: seen.append(name))
    handle.remove()
    assert not called and len(seen) == 6 * 4


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.twice(torch.relu(self.twice(x)))


def test_a_layer_that_is_called_twice_shows_both_inputs():
    torch.manual_seed(0)
    model = Shared()
    x = torch.randn(5, 8)
    both = torch.cat([x, torch.relu(model.twice(x))]).detach()
    expected = keep_top_in_rows(model.twice.weight.detach().abs() * both.norm(dim=0), 4)
    assert torch.equal(prune(model, 0.5, batches=[x]).masks["twice.weight"], expected)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x[:, 0]
        for step in x.unbind(1):
            h = torch.tanh(self.cell(h + step))
        return h


def test_a_layer_that_later_batches_call_more_often_shows_all_inputs():
    torch.manual_seed(0)
    model = Recurrent().eval()
    data = [torch.randn(3, length, 8) for length in (2, 7, 4)]
    seen: list[str] = []
    walk = Walk(model, {"cell.weight": model.cell}, data, lambda model, batch: model(batch))
    walk.show(["cell.weight"], lambda name, module, x: seen.append(name))
    assert len(seen) == 13


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts[int(x[0, 0] > 0)](x)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_an_expert_that_one_batch_uses(method):
    data = [torch.ones(4, 8), -torch.ones(4, 8)]
    assert prune(Experts(), 0.5, method=method, batches=data).sparsity == 0.5


def test_names_are_in_the_order_of_all_batches():
    assert merged([["a", "c"], ["a", "b", "b", "c", "d"], ["e", "a"]]) == ["e", "a", "b", "c", "d"]
    assert merged([]) == []


def test_a_layer_that_no_input_reaches_has_no_sum():
    with pytest.raises(RarefyError, match="sparsegpt saw no input of w; leave it out of the filter"):
        Hessians().take("w")


@pytest.mark.parametrize("method", METHODS)
def test_in_inference_mode(method):
    expected = prune(make_model().eval(), 0.5, method=method, batches=batches(), loss=loss)
    with torch.inference_mode():
        data = batches()
    model = make_model().eval()
    with torch.inference_mode():
        done = prune(model, 0.5, method=method, batches=data, loss=loss)
        made = make_model()
    assert all(torch.equal(mask, done.masks[name]) for name, mask in expected.masks.items())
    assert done.loss_after == expected.loss_after
    with pytest.raises(
        RarefyError, match=r"0\.weight is an inference tensor.*; build or load the model outside"
    ):
        prune(made, 0.5, method=method, batches=batches(), loss=loss)


def test_remedies_are_options_of_prune():
    with pytest.raises(
        RarefyError, match=r"leaves no connection in .*; give distribution: erk, a lower"
    ) as one:
        prune(make_model(), 0.99, method="snip", pattern={"block": [4, 4]}, batches=batches(), loss=loss)
    with pytest.raises(RarefyError, match=r"leave it out of param_filter, or take another method") as other:
        prune(nn.MultiheadAttention(8, 2), 0.5, batches=batches(), loss=lambda model, batch: torch.ones(()))
    assert "scope" not in str(one.value) and "init_method" not in str(other.value)
    prune(make_model(), 0.8, method="snip", distribution="erk", batches=batches(), loss=loss)


def test_turned_layers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    turned = transformers.pytorch_utils.Conv1D(12, 16)
    plain = nn.Linear(16, 12)
    plain.weight.data.copy_(turned.weight.data.t())
    x = torch.randn(40, 16)
    for method in ("wanda", "sparsegpt"):
        one, other = copy.deepcopy(turned), copy.deepcopy(plain)
        prune(one, 0.5, method=method, batches=[x])
        prune(other, 0.5, method=method, batches=[x])
        assert torch.equal(one.weight.t(), other.weight)


def test_fine_tuning_afterwards():
    model = make_model()
    done = prune(model, 0.75, method="sparsegpt", batches=batches(), loss=loss)
    rarefy.Static(0.75, init_method="from_zeros").apply(model)
    assert all(
        torch.equal(model.get_submodule(name[:1]).weight_mask, mask) for name, mask in done.masks.items()
    )


def test_without_batches_or_a_loss():
    assert prune(make_model(), 0.5, method="magnitude").loss_before is None
    layer = nn.Linear(8, 4)
    assert prune(layer, 0.5, method="wanda", batches=[torch.randn(2, 8)]).loss_after is None


def test_half_precision():
    torch.manual_seed(0)
    model = nn.Linear(16, 8).bfloat16()
    done = prune(model, 0.5, method="sparsegpt", batches=[torch.randn(40, 16).bfloat16()])
    assert model.weight.dtype == torch.bfloat16 and done.sparsity == 0.5


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


REFUSALS: list[tuple[Any, dict[str, Any], str]] = [
    (make_model, {"method": "wandaa"}, r"method: 'wandaa' is not allowed; .*did you mean wanda\?"),
    (make_model, {"batches": ()}, "batches: data without a batch is not allowed"),
    (make_model, {"batches": torch.ones(2, 8)}, r"batches: a tensor of shape \[2, 8\]"),
    (make_model, {"sparsity": 1.0}, r"sparsity: 1 is not allowed; give a fraction in \[0, 1\)"),
    (make_model, {"param_filter": {"*.weight": {}}}, "param_filter: a mapping is not allowed; give a glob"),
    (make_model, {"param_filter": "x*"}, "param_filter: 'x\\*' .it matches no parameter."),
    (
        make_model,
        {"method": "sparsegpt", "pattern": {"block": [2, 2]}},
        "sparsegpt cannot prune by the pattern",
    ),
    (
        Tied,
        {"batches": [torch.ones(1, 4)], "loss": None},
        r"wanda cannot tell the inputs of a\.weight, which is tied",
    ),
    (
        lambda: nn.Conv1d(8, 4, 1),
        {"method": "sparsegpt", "batches": [torch.ones(1, 8, 3)], "loss": None},
        "sparsegpt prunes linear layers, and weight is of a Conv1d; leave it out, or take wanda",
    ),
    (
        lambda: nn.Sequential(nn.Linear(8, 4), nn.ModuleList([nn.Linear(4, 4)])),
        {"batches": [torch.ones(1, 8)], "loss": lambda model, x: model[0](x)},
        r"1\.0\.weight is not used by the batches; leave it out of the filter, or give others",
    ),
    (
        make_model,
        {"method": "sparsegpt", "batches": [(torch.full((2, 8), torch.inf), torch.zeros(2).long())]},
        r"sparsegpt saw an input of 0\.weight that is not finite; look at data and weights",
    ),
]


def without_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 4))


def never_called(model: nn.Module, batch: Any) -> torch.Tensor:
    return (batch[0] @ model[0].weight.t()).sum()


REFUSALS += [
    (make_model, {"distribution": "global"}, r"give uniform, er or erk \(example: distribution: erk\)$"),
    (make_model, {"sparsity": [0.1, 0.5]}, r"a schedule is not allowed; give a number in \[0, 1\) \(example"),
    (make_model, {"method": "snip", "sparsity": 0.99}, "^snip at sparsity 0.99 leaves no connection in"),
    (
        make_model,
        {"method": "snip", "loss": lambda model, batch: loss(model, batch).detach()},
        "^snip: the loss has no gradient",
    ),
    (
        lambda: make_model().half(),
        {"method": "grasp", "batches": [(torch.randn(2, 8).half(), torch.zeros(2).long())]},
        r"^grasp needs more range than 0\.weight has",
    ),
    (
        make_model,
        {"method": "synflow", "loss": lambda model, batch: model[0](batch[0]).sum()},
        r"^synflow: the output does not depend on 3\.weight; leave it out of param_filter",
    ),
    *(
        (
            without_layers,
            {"method": method, "loss": never_called},
            f"^{method}: no layer with a weight matrix was called; take magnitude, wanda or sparsegpt$",
        )
        for method in ("grasp", "synflow")
    ),
]


@pytest.mark.parametrize(("make", "changes", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(make, changes, message):
    options = {"sparsity": 0.5, "method": "wanda", "batches": batches(), "loss": loss, **changes}
    with pytest.raises(RarefyError, match=message):
        prune(make(), options.pop("sparsity"), **options)


def test_a_model_that_an_algorithm_holds_is_refused():
    model = make_model()
    sparsity = rarefy.Static(0.5)
    sparsity.apply(model)
    for method in ("magnitude", "wanda"):
        with pytest.raises((RarefyError, ConfigError), match="has a sparsity algorithm already"):
            prune(model, 0.5, method=method, batches=batches(), loss=loss)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_dropout_is_off_while_inputs_are_measured(method: str) -> None:
    found = []
    for rate in (0.0, 0.9):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(rate), nn.Linear(8, 16))
        done = prune(model, 0.5, method=method, batches=[x for x, _ in batches()])
        assert model.training and model[0].training
        found.append(done.masks["1.weight"])
    assert torch.equal(*found)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_small_weight_keeps_a_connection_where_rounding_would_leave_none(method: str) -> None:
    model = nn.Sequential(nn.Linear(8, 2), nn.Linear(2, 2))
    done = prune(model, 0.97, method=method, batches=[x for x, _ in batches()])
    assert int(done.masks["1.weight"].sum()) >= 1
