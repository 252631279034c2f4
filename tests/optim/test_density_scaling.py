"""SµPar: weights and learning rates that follow the density, so that activations do not."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.algorithms.base import Sparsifier, SparsityAlgorithm
from rarefy.algorithms.dynamic import DynamicSparsityAlgorithm
from rarefy.errors import ConfigError
from rarefy.models import build_model
from rarefy.models.gpt import GPTModel
from rarefy.optim.optimizers import build_optimizer, parameter_groups

BASE = 128


def decoder(width: int = 1, *, mup: bool = True, base: int = BASE) -> GPTModel:
    """A decoder of one layer, so many times as wide as its base."""
    sizes: dict[str, Any] = {
        "name": "gpt3",
        "vocab_size": 64,
        "hidden_size": base * width,
        "filter_size": 2 * base * width,
        "num_heads": 4,
        "num_hidden_layers": 1,
        "max_position_embeddings": 16,
        "initializer_range": 0.1,
        "dropout_rate": 0.0,
        "use_ffn_bias": False,
        "use_projection_bias_in_attention": False,
        "use_ffn_bias_in_attention": False,
    }
    bases = {"mup_base_hidden_size": base, "mup_base_filter_size": 2 * base}
    torch.manual_seed(1)
    model = build_model({**sizes, **(bases if mup else {})})
    assert isinstance(model, GPTModel)
    return model


def supar(sparsity: float = 0.75, **options: Any) -> Sparsifier:
    return rarefy.configure({"sparsity": sparsity, "seed": 1, "parametrization": "supar", **options})


def activation_after(width: int, sparsity: float, parametrization: str, steps: int = 3) -> float:
    """The mean size of what the feed-forward part puts out after some steps of Adam on one batch."""
    model = decoder(width, mup=parametrization == "supar")
    algorithm = supar(sparsity, parametrization=parametrization)
    algorithm.apply(model)
    optimizer = build_optimizer({"AdamW": {"lr": 2e-3}}, model, densities=algorithm.densities)
    algorithm.apply(optimizer)
    sizes: list[float] = []
    feed_forward = model.get_submodule("model.transformer_decoder.layers.0.ffn")
    feed_forward.register_forward_hook(lambda _, __, out: sizes.append(out.abs().mean().item()))
    ids = torch.randint(0, 64, (4, 17), generator=torch.Generator().manual_seed(5))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": torch.ones(4, 16)}
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()
    model(batch)
    return sizes[-1]


def test_activations_are_flat_over_sparsity_and_width():
    dense = activation_after(1, 0.0, "supar")
    for width, sparsity in product((1, 2, 4), (0.0, 0.5, 0.9, 0.97)):
        assert activation_after(width, sparsity, "supar") == pytest.approx(dense, rel=0.2), (width, sparsity)


def test_without_it_they_follow_both():
    dense = activation_after(1, 0.0, "standard")
    assert activation_after(1, 0.9, "standard") < dense / 5
    assert activation_after(4, 0.0, "standard") > dense * 3


def test_a_sparse_weight_has_its_spread_and_its_rate_divided_by_density_and_width():
    model = decoder(2, base=32)
    name = "model.transformer_decoder.layers.0.ffn.ffn.0.linear_layer.weight"
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    algorithm = supar(0.75, param_filter=name)
    algorithm.apply(model)
    mask = algorithm.algorithms[0].parameters[name].mask
    torch.testing.assert_close(model.get_parameter(name).detach(), before[name] * mask * 2)
    others = [other for other in before if other != name]
    assert all(torch.equal(model.get_parameter(other), before[other]) for other in others)
    optimizer = build_optimizer({"AdamW": {"lr": 0.8}}, model, densities=algorithm.densities)
    algorithm.apply(optimizer)
    rates = {one: group["lr"] for group in optimizer.param_groups for one in group["params"]}
    assert rates[model.get_parameter(name)] == 0.8 / 2 / 0.25
    assert rates[model.get_parameter(name.replace("ffn.0", "ffn.1"))] == 0.8 / 2
    assert rates[model.get_parameter("model.ln_f.weight")] == 0.8


def test_each_weight_follows_its_own_density():
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64))
    algorithm = supar(0.8, distribution="erk")
    algorithm.apply(model)
    densities = algorithm.densities
    assert densities == {
        name: one.mask.float().mean() for name, one in algorithm.algorithms[0].parameters.items()
    }
    assert len(set(densities.values())) == 2
    groups = parameter_groups(model, densities=densities)
    factors = {group["adjust_learning_rate"]: group["params"] for group in groups[1:]}
    assert factors == {
        1 / densities["0.weight"]: [model[0].weight],
        1 / densities["1.weight"]: [model[1].weight],
    }


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_members_of_a_group_and_storages(compute: str):
    inner = nn.Linear(64, 64)
    model = nn.Sequential(inner, nn.Linear(64, 64))
    first = inner.weight.detach().clone()
    entry = {"sparsity": 0.75, "compute": compute}
    block = [
        {**entry, "param_filter": "0.weight", "parametrization": "supar"},
        {**entry, "param_filter": "1.weight"},
    ]
    group = rarefy.configure(block, seed=1)
    group.apply(model)
    assert group.densities == {"0.weight": 0.25}
    dense = group.algorithms[0].parameters["0.weight"].dense_weight()
    torch.testing.assert_close(dense.detach(), first * group.algorithms[0].parameters["0.weight"].mask * 2)
    group.apply(build_optimizer({"Adam": {}}, model, densities=group.densities))


def test_a_weight_without_connections_and_one_without_memory_stay():
    weights = {"none": torch.ones(2), "meta": torch.ones(2, device="meta")}
    scaling = supar().algorithms[0].scaling
    scaling.scale(weights, {name: weight < 0 for name, weight in weights.items()})
    assert scaling.densities == {"none": 1.0, "meta": 1.0}
    assert weights["none"].tolist() == [1.0, 1.0]


class Narrow(DynamicSparsityAlgorithm):
    """Uses fewer connections in forward passes."""

    def update_mask(self, view: Any) -> Tensor:
        return view.mask

    def forward_mask(self, view: Any) -> Tensor:
        return view.mask


SCHEDULE = {"type": "linear", "init": 0.1, "slope": 0.01}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"parametrization": "mup"},
            "sparsity.parametrization: 'mup' is not allowed; give standard or supar",
        ),
        ({"parametrization": None}, "sparsity.parametrization: null is not allowed; give standard or supar"),
        ({"algorithm": "gmp", "sparsity": SCHEDULE}, "supar beside a sparsity that changes"),
        ({"algorithm": "set", "update": {"freq": 2, "start": 1}}, "update schedule that leaves out step 0"),
        ({"algorithm": Narrow}, "forward passes use fewer connections than are active"),
    ],
)
def test_refused_in_a_block(options: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=r"sparsity\.parametrization") as caught:
        supar(**options)
    assert message in str(caught.value)


def small() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(8, 8), nn.Linear(8, 8))


def test_an_embedding_is_refused_before_anything_is_changed():
    model = small()
    before = model.get_parameter("1.weight").detach().clone()
    with pytest.raises(ConfigError, match=r"supar beside 0\.weight, which is an embedding"):
        supar(param_filter=["1.weight", "0.weight"]).apply(model)
    assert torch.equal(model.get_parameter("1.weight"), before)


def plain(model: nn.Module, _: SparsityAlgorithm) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters())


def groups_alone(model: nn.Module, algorithm: SparsityAlgorithm) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameter_groups(model, densities=algorithm.densities), lr=0.1)


def of_another_kind(model: nn.Module, algorithm: SparsityAlgorithm) -> torch.optim.Optimizer:
    return build_optimizer({"SGD": {"lr": 0.1}}, model, densities=algorithm.densities)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (plain, "a learning rate of 1.weight that is not divided by its density 0.25"),
        (groups_alone, "a learning rate of 1.weight that is not divided by its density 0.25"),
        (of_another_kind, "supar beside SGD is not allowed; give AdamW"),
    ],
)
def test_an_optimizer_that_trains_otherwise_is_refused(make: Callable[..., Any], message: str):
    model = small()
    algorithm = supar()
    algorithm.apply(model)
    with pytest.raises(ConfigError, match=message):
        algorithm.apply(make(model, algorithm))


def test_an_optimizer_before_the_model_is_refused():
    algorithm = supar()
    with pytest.raises(ConfigError, match=r"give apply\(model\) first"):
        algorithm.apply(torch.optim.AdamW(small().parameters()))
