"""First masks that are measured on data: against naive references, under every pattern, in every storage."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import cross_entropy

import rarefy
from rarefy.errors import ConfigError, RarefyError
from rarefy.first_masks import Grasp, MagnitudeMixed, Snip, SynFlow, Wanda
from rarefy.masks import kept_count

METHODS = {
    "snip": {},
    "grasp": {"temperature": 2.0},
    "synflow": {"rounds": 7},
    "wanda": {},
}
PATTERNS: list[dict[str, Any]] = [
    {},
    {"pattern": {"n": 2, "m": 4}},
    {"pattern": {"block": [2, 4]}},
    {"balance_out_groups": 2},
    {"balance_in_groups": 2},
    {"distribution": "erk"},
    {"pattern": "fan_in"},
    {"pattern": "fan_out"},
    {"pattern": "diagonal"},
    {"pattern": {"n": 2, "m": 4, "transposable": True}},
]


def make_model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4)
    )


def batches(seed: int = 0) -> list[Any]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(9, 8, generator=generator), torch.randint(4, (9,), generator=generator))
        for _ in range(3)
    ]


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return cross_entropy(model(batch[0]), batch[1])


def applied(method: str, model: nn.Module | None = None, **options: Any) -> dict[str, torch.Tensor]:
    """The masks of a model by a method; `of` holds its own options."""
    model = make_model() if model is None else model
    init_method = {
        "name": method,
        "batches": batches(),
        "loss": loss,
        **METHODS[method],
        **options.pop("of", {}),
    }
    block = {"algorithm": "static", "sparsity": 0.5, "seed": 3, "init_method": init_method, **options}
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    return {name: one.mask.clone() for name, one in sparsity.algorithms[0].parameters.items()}


def mean_loss(model: nn.Module) -> torch.Tensor:
    return torch.stack([loss(model, batch) for batch in batches()]).mean()


def top(scores: dict[str, torch.Tensor], count: int) -> dict[str, torch.Tensor]:
    flat = torch.cat([one.flatten() for one in scores.values()])
    least = flat.sort(descending=True).values[count - 1]
    return {name: one >= least for name, one in scores.items()}


def weights_of(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.dim() == 2}


def test_snip_naively():
    model = make_model()
    mean_loss(model).backward()
    scores = {name: (one * one.grad).abs().detach() for name, one in weights_of(model).items()}
    expected = top(scores, kept_count(8 * 16 + 16 * 12 + 12 * 4, 0.8))
    found = applied("snip", sparsity=0.8)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_grasp_naively():
    model = make_model().double()
    weights = weights_of(model)

    def warm(batch: Any) -> torch.Tensor:
        return cross_entropy(model(batch[0].double()) / 200.0, batch[1])

    mean = torch.stack([warm(batch) for batch in batches()]).mean()
    gradients = torch.autograd.grad(mean, list(weights.values()), create_graph=True)
    # Hg is half the gradient of |g|².
    half = sum(one.square().sum() for one in gradients) / 2
    products = torch.autograd.grad(half, list(weights.values()))
    scores = {n: (w * p).detach() for (n, w), p in zip(weights.items(), products, strict=True)}
    expected = top(scores, kept_count(368, 0.5))
    data = [(x.double(), y) for x, y in batches()]
    found = applied("grasp", make_model().double(), of={"temperature": 200.0, "batches": data})
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_synflow_naively():
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).double()
    names = ["0.weight", "2.weight", "4.weight"]
    matrices = [model.get_parameter(name).detach().abs() for name in names]
    masks = [torch.ones_like(one) for one in matrices]
    total = sum(one.numel() for one in matrices)
    for turn in range(1, 101):
        leaves = [(one * mask).requires_grad_() for one, mask in zip(matrices, masks, strict=True)]
        flow = torch.ones(1, 5).double() @ leaves[0].T @ leaves[1].T @ leaves[2].T
        scores = [
            one * grad for one, grad in zip(leaves, torch.autograd.grad(flow.sum(), leaves), strict=True)
        ]
        flat = torch.cat([one.detach().flatten() for one in scores])
        count = kept_count(total, 1 - 0.2 ** (turn / 100))
        least = flat.sort(descending=True).values[count - 1]
        masks = [(one >= least).double() for one in scores]
    data = [torch.randn(3, 5).double()]
    call = lambda model, x: model(x)  # noqa: E731
    found = applied("synflow", model, sparsity=0.8, of={"rounds": 100, "batches": data, "loss": call})
    assert all(torch.equal(found[name], mask > 0) for name, mask in zip(names, masks, strict=True))


def test_synflow_leaves_no_layer_empty_where_snip_would():
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (nn.Linear(16, 16), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(16, 4))
    with torch.no_grad():
        model[4].weight *= 1e-3
    data = [(torch.randn(9, 16), torch.randint(4, (9,)))]
    masks = applied("synflow", copy.deepcopy(model), sparsity=0.98, of={"rounds": 100, "batches": data})
    assert all(int(mask.sum()) for mask in masks.values())
    with pytest.raises(
        RarefyError,
        match=r"init_method snip at sparsity 0\.99 leaves no connection in .*; give distribution: erk",
    ):
        applied("snip", model, sparsity=0.99, of={"batches": data})


def test_wanda_naively():
    model = make_model().eval()
    found = applied("wanda", copy.deepcopy(model).train(), sparsity=0.75)
    inputs: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for x, _ in batches():
        for index, layer in enumerate(model):
            if isinstance(layer, nn.Linear):
                inputs[f"{index}.weight"].append(x)
            x = layer(x)
    for name, seen in inputs.items():
        norms = torch.cat(seen).norm(dim=0)
        for row, mask in zip(model.get_parameter(name), found[name], strict=True):
            kept = (row.abs() * norms).argsort(descending=True)[: kept_count(len(row), 0.75)]
            assert mask.nonzero().flatten().tolist() == sorted(kept.tolist())


class Tied(nn.Module):
    """Two layers of one weight, which is given other inputs in each."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).exp())


@pytest.mark.parametrize("compute", ["masked", "auto"])
def test_wanda_of_a_tied_weight_sees_the_inputs_of_both_layers(compute):
    model = Tied()
    x = torch.cat([x for x, _ in batches()])
    both = torch.cat([x, model.first(x).exp()]).norm(dim=0)
    expected = (model.first.weight.abs() * both).topk(4, dim=1).indices.sort(dim=1).values
    found = applied("wanda", model, compute=compute)
    assert list(found) == ["first.weight"]
    assert torch.equal(found["first.weight"].nonzero()[:, 1].view(8, 4), expected)


class Lookup(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.table = nn.Embedding(8, 8)
        self.table.weight = self.layer.weight


def test_wanda_of_a_weight_that_is_tied_to_one_it_cannot_see():
    with pytest.raises(
        RarefyError, match=r"init_method wanda needs the inputs of layer\.weight, which a Embedding"
    ):
        applied("wanda", Lookup(), param_filter="layer.weight")


class Turned(nn.Module):
    """A layer that has its weight as [in, out], as Hugging Face's Conv1D."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        self.layer = transformers.pytorch_utils.Conv1D(5, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize("changes", [{}, {"balance_out_groups": 5}, {"balance_in_groups": 2}])
def test_wanda_of_a_turned_layer(changes):
    torch.manual_seed(0)
    model = Turned()
    plain = nn.Linear(8, 5)
    plain.weight.data.copy_(model.layer.weight.data.t())
    found = applied("wanda", model, **changes)["layer.weight"]
    assert torch.equal(found.t(), applied("wanda", plain, **changes)["weight"])


def test_wanda_of_convolutions():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=2), nn.Flatten(), nn.LazyLinear(4)
    )
    x = torch.randn(3, 2, 6, 6)
    model(x)
    data = [(x, torch.randint(4, (3,)))]
    found = applied("wanda", model, of={"batches": data})
    assert (found["0.weight"].flatten(1).sum(1) == 9).all() and (
        found["2.weight"].flatten(1).sum(1) == 9
    ).all()


@pytest.mark.parametrize("changes", PATTERNS, ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_every_pattern_and_distribution(method, changes):
    masks = applied(method, **changes)
    algorithm = rarefy.configure({"algorithm": "static", "sparsity": 0.5, "init_method": "topk", **changes})
    algorithm.apply(make_model())
    for name, parameter in algorithm.parameters.items():
        pattern = parameter.pattern
        pieces = pattern.split(masks[name])
        assert all(pattern.structure.holds(piece, 0.5) for piece in pieces)
        assert len({int(piece.sum()) for piece in pieces}) == 1
    total = sum(int(mask.sum()) for mask in masks.values())
    assert abs(total - 184) <= 16
    if changes.get("distribution") == "erk" and method != "wanda":
        assert [int(one.sum()) for one in masks.values()] == [
            p.storage.active for p in algorithm.parameters.values()
        ]


@settings(max_examples=12, deadline=None)
@given(method=st.sampled_from(list(METHODS)), sparsity=st.floats(0, 0.9), seed=st.integers(0, 9))
def test_counts(method, sparsity, seed):
    masks = applied(method, make_model(seed), sparsity=sparsity, of={"scope": "layer"})
    assert [int(one.sum()) for one in masks.values()] == [
        kept_count(one.numel(), sparsity) for one in masks.values()
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_other_number_formats(method, dtype):
    data = [(x.to(dtype), y) for x, y in batches()]
    masks = applied(method, make_model().to(dtype), of={"batches": data, "scope": "layer"})
    assert sum(int(one.sum()) for one in masks.values()) == 184


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_storages_and_training(method, compute):
    model = make_model()
    options = {"name": method, "batches": batches(), "loss": loss, **METHODS[method]}
    sparsity = rarefy.configure({"sparsity": 0.5, "seed": 3, "init_method": options, "compute": compute})
    expected = applied(method)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        mean_loss(model).backward()
        optimizer.step()
    for name, parameter in sparsity.algorithms[0].parameters.items():
        assert parameter.storage.kind == compute and torch.equal(parameter.mask, expected[name])
        assert not parameter.dense_weight()[~parameter.mask].any()


@pytest.mark.parametrize("method", ["snip", "wanda"])
def test_each_member_of_a_group_is_measured_in_the_dense_model(method):
    model = make_model()
    options = {"name": method, "batches": batches(), "loss": loss, "scope": "layer", **METHODS[method]}
    entries = [
        {"sparsity": 0.5, "seed": 3, "init_method": options, "param_filter": glob}
        for glob in ("0.*", "[35].*")
    ]
    for entry in entries:
        entry["param_filter"] += "weight"
    group = rarefy.configure(entries)
    group.apply(model)
    alone = applied(method, of={"scope": "layer"})
    found = {name: one.mask for member in group.algorithms for name, one in member.parameters.items()}
    assert all(torch.equal(alone[name], found[name]) for name in alone)


def test_updates_go_on_from_a_measured_mask():
    block = {"algorithm": "set", "sparsity": 0.5, "update": {"freq": 1}, "seed": 0}
    block["init_method"] = {"name": "snip", "batches": batches(), "loss": loss}
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    counts = [int(one.mask.sum()) for one in sparsity.parameters.values()]
    mean_loss(model).backward()
    optimizer.step()
    assert counts == [int(one.mask.sum()) for one in sparsity.parameters.values()] == [64, 96, 24]


def test_with_a_global_distribution_updates_compete_as_well():
    block = {
        "algorithm": "gmp",
        "sparsity": [0.5, 0.75],
        "update": {"freq": 1},
        "seed": 0,
        "distribution": "global",
    }
    sparsity = rarefy.configure(
        {**block, "init_method": {"name": "snip", "batches": batches(), "loss": loss}}
    )
    sparsity.apply(make_model())
    expected = applied("snip")
    assert all(torch.equal(one.mask, expected[name]) for name, one in sparsity.parameters.items())
    sparsity.update()
    assert sum(int(one.mask.sum()) for one in sparsity.parameters.values()) == kept_count(368, 0.75)


def test_a_dense_start_measures_nothing():
    block = {"algorithm": "rigl", "sparsity": 0.5, "update": {"freq": 1, "start": 2}}
    sparsity = rarefy.configure({**block, "init_method": {"name": "snip", "batches": []}})
    model = make_model()
    sparsity.apply(model)
    assert all(bool(one.mask.all()) for one in sparsity.parameters.values())


def test_grasp_refuses_float16():
    data = [(x.half(), y) for x, y in batches()]
    said = "grasp needs more range than 0.weight has, which is float16; take bfloat16 or float32"
    with pytest.raises(RarefyError, match=said):
        applied("grasp", make_model().half(), of={"batches": data})


@pytest.mark.parametrize("method", METHODS)
def test_in_inference_mode(method):
    expected = applied(method)
    model = make_model()
    with torch.inference_mode():
        found = applied(method, model)
        made = make_model()
    assert all(torch.equal(mask, found[name]) for name, mask in expected.items())
    with pytest.raises(RarefyError, match=r"0\.weight is an inference tensor"):
        applied(method, made)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Snip(), "batches: a missing value is not allowed; give a whole number"),
        (lambda: Snip([], scope="row"), "scope: 'row' is not allowed; give global or layer"),
        (lambda: Grasp([], temperature=-1), "temperature: -1 is not allowed; give a number > 0"),
        (lambda: SynFlow(rounds=0), "rounds: 0 is not allowed; give a whole number ≥ 1"),
        (
            lambda: Wanda([], scop="layer"),
            r"the key 'scop' is not allowed; give a known key \(did you mean scope",
        ),
        (lambda: MagnitudeMixed(2), r"share: 2 is not allowed; give a number in \[0, 1\]"),
    ],
)
def test_constructors_word_what_they_refuse(make, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        make()


def test_only_batches_go_without_their_name():
    with pytest.raises(TypeError, match="too many positional arguments"):
        Snip([], loss)


def test_objects_are_the_same_as_mappings():
    made = {
        "snip": Snip(batches(), loss=loss),
        "grasp": Grasp(batches=batches(), loss=loss, temperature=2.0),
        "synflow": SynFlow(batches=batches, loss=loss, rounds=7),
        "wanda": Wanda(batches=iter(batches()), loss=loss),
    }
    for name, method in made.items():
        sparsity = rarefy.Static(0.5, init_method=method, seed=3)
        model = make_model()
        sparsity.apply(model)
        masks = applied(name)
        assert all(torch.equal(one.mask, masks[n]) for n, one in sparsity.parameters.items())


@settings(max_examples=25, deadline=None)
@given(
    share=st.floats(0, 1),
    sparsity=st.floats(0, 1),
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_magnitude_mixed(share, sparsity, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = MagnitudeMixed(share=share)(weight, sparsity, torch.Generator().manual_seed(1))
    kept = kept_count(weight.numel(), sparsity)
    large = (
        weight.abs()
        .flatten()
        .argsort(descending=True)[: kept_count(weight.numel(), 1 - share * (1 - sparsity))]
    )
    assert int(mask.sum()) == kept
    assert int(mask.flatten()[large].sum()) == min(len(large), kept)


def test_magnitude_mixed_in_a_pattern():
    layer = nn.Linear(16, 8)
    first = layer.weight.detach().clone()
    method = {"name": "magnitude_mixed", "share": 0.5}
    rarefy.configure({"sparsity": 0.5, "pattern": {"n": 2, "m": 4}, "init_method": method}).apply(layer)
    groups = layer.weight_mask.view(-1, 4)
    assert (groups.sum(1) == 2).all()
    assert groups.gather(1, first.abs().view(-1, 4).argmax(1, keepdim=True)).all()


REFUSALS = [
    (
        {"name": "snip", "batches": 4},
        {},
        "the number 4 outside of a Trainer is not allowed; give the batches themselves",
    ),
    ({"name": "snip", "batches": []}, {}, "init_method.batches: data without a batch is not allowed"),
    (
        {"name": "snip", "batches": torch.ones(2, 8)},
        {},
        r"init_method.batches: a tensor of shape \[2, 8\] is not",
    ),
    ({"name": "snip", "batches": {"x": 1}}, {}, r"init_method.batches: {'x': 1} is not allowed; give a list"),
    (
        {"name": "snip", "batches": 2.5},
        {},
        "init_method.batches: 2.5 is not allowed; give a whole number ≥ 1",
    ),
    ({"name": "snip", "batches": 0}, {}, "init_method.batches: 0 is not allowed; give a whole number ≥ 1"),
    ({"name": "wanda", "batches": -1}, {}, "init_method.batches: -1 is not allowed; give a whole number ≥ 1"),
    ({"name": "grasp", "batches": True}, {}, "init_method.batches: true is not allowed; give a whole number"),
    ({"name": "synflow", "batches": "4"}, {}, "init_method.batches: '4' is not allowed; give a whole number"),
    ({"name": "snip"}, {}, "init_method.batches: a missing value is not allowed; give a whole number"),
    ("snip", {}, "init_method.batches: a missing value"),
    (
        {"name": "snip", "batch": 1},
        {},
        r"init_method: the key 'batch' is not allowed; give a known key \(did you mean",
    ),
    ({"name": "snipp", "batches": 1}, {}, r"init_method.name: 'snipp' is not allowed; .*did you mean snip\?"),
    ({"batches": 1}, {}, "init_method.name: a missing value is not allowed; give a known method"),
    (
        {"name": "topk", "batches": 1},
        {},
        "init_method: the key 'batches' with topk is not allowed; give the name alone",
    ),
    (
        {"name": "snip", "batches": [], "scope": "row"},
        {},
        "init_method.scope: 'row' is not allowed; give global or",
    ),
    (
        {"name": "wanda", "batches": [], "scope": "global"},
        {},
        "init_method.scope: 'global' is not allowed; give output",
    ),
    (
        {"name": "grasp", "batches": [], "temperature": 0},
        {},
        "init_method.temperature: 0 is not allowed; give a number > 0",
    ),
    (
        {"name": "synflow", "batches": [], "rounds": 0},
        {},
        "init_method.rounds: 0 is not allowed; give a whole number",
    ),
    (
        {"name": "magnitude_mixed", "share": 2},
        {},
        r"init_method.share: 2 is not allowed; give a number in \[0, 1\]",
    ),
    (
        {"name": "snip", "batches": [], "scope": "global"},
        {"distribution": "erk"},
        "init_method.scope: global beside distribution erk, which says .* is not allowed; give layer",
    ),
    (
        {"name": "snip", "batches": [], "scope": "global"},
        {"algorithm": "set"},
        "init_method.scope: global beside updates, which hold each weight at its own target, is not allowed",
    ),
    (
        {"name": "snip", "batches": [], "scope": "global"},
        {"pattern": {"n": 2, "m": 4}},
        "init_method.scope: global beside the pattern {n: 2, m: 4}, of which every weight keeps n of m,",
    ),
    (
        {"name": "snip", "batches": []},
        {"parametrization": "supar"},
        "parametrization: supar beside an init_method that is measured on data is not allowed",
    ),
]


@pytest.mark.parametrize(("init_method", "more", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(init_method, more, message):
    with pytest.raises(ConfigError, match=message) as caught:
        rarefy.configure({"sparsity": 0.5, **more, "init_method": init_method}).apply(make_model())
    assert str(caught.value).startswith("sparsity.")


def test_without_a_loss_the_error_names_it():
    init_method = {"name": "snip", "batches": batches()}
    with pytest.raises(
        RarefyError, match=r"init_method snip: the model cannot be called with a batch .*; give loss: a"
    ):
        rarefy.configure({"sparsity": 0.5, "init_method": init_method}).apply(make_model())


def test_weights_that_wanda_cannot_see():
    model = nn.MultiheadAttention(8, 2)
    block = {"sparsity": 0.5, "init_method": {"name": "wanda", "batches": batches(), "loss": loss}}
    with pytest.raises(
        RarefyError, match="init_method wanda needs the inputs of in_proj_weight, which a Multihead"
    ):
        rarefy.configure(block).apply(model)
    assert not hasattr(model, "in_proj_weight_mask")


class Beside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(8, 4)
        self.idle = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.used(x)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("snip", "init_method snip: the loss does not depend on idle.weight; leave it out of param_filter"),
        ("grasp", "init_method grasp: the loss does not depend on idle.weight"),
        ("synflow", "init_method synflow: .*the output does not depend on idle.weight"),
        ("wanda", "init_method wanda saw no input of idle.weight"),
    ],
)
def test_weights_that_the_batches_do_not_use(method, message):
    with pytest.raises(RarefyError, match=message):
        applied(method, Beside())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 8)
        self.qkv = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 9)

    def forward(self, batch: Any) -> torch.Tensor:
        x = self.embedding(batch[0])
        q, k, v = (part(x) for part in self.qkv)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + mixed).mean()


def test_the_flow_through_attention():
    torch.manual_seed(0)
    tokens = torch.randint(9, (2, 5))
    method = {"name": "synflow", "rounds": 3, "batches": [(tokens, tokens)], "output": "qkv.2"}
    block = {"sparsity": 0.5, "param_filter": ["qkv.2.weight"], "init_method": method}
    rarefy.configure(block).apply(Attention())
    block["param_filter"] = ["qkv.0.weight", "qkv.2.weight"]
    block["init_method"]["output"] = "last"
    model = Attention()
    model.last = nn.Linear(8, 8)
    model.forward = lambda batch: mixed(model, batch)
    with pytest.raises(
        RarefyError, match=r"init_method synflow: nothing flows through qkv\.0\.weight; leave it out"
    ):
        rarefy.configure(block).apply(model)


def mixed(model: nn.Module, batch: Any) -> torch.Tensor:
    x = model.embedding(batch[0])
    q, k, v = (part(x) for part in model.qkv)
    return model.last(nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)).mean()


def test_synflow_names_a_layer_without_flow():
    model = nn.Sequential(nn.Linear(8, 4), nn.Softmax(-1), nn.Linear(4, 4))
    with torch.no_grad():
        model[2].weight.fill_(0.5)
    with pytest.raises(
        RarefyError, match=r"init_method synflow: nothing flows through 0\.weight; leave it out"
    ):
        applied("synflow", model)
