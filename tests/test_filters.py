"""Spec §1: which parameters become sparse, and why."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from rarefy.errors import ConfigError
from rarefy.filters import candidates, check_filter, decide, default_reason, select


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding_layer = nn.Linear(4, 4)
        self.wte = nn.Embedding(10, 4)
        self.bag = nn.EmbeddingBag(10, 4)
        self.block = nn.ModuleDict(
            {"Norm_proj": nn.Linear(4, 4), "fc": nn.Linear(4, 4), "conv": nn.Conv2d(1, 2, 3)}
        )
        self.ln = nn.LayerNorm((4, 4))
        self.PE_helper = nn.Linear(4, 4)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.wte.weight
        self.lm_head = nn.Linear(4, 10)


def reasons(model):
    return {candidate.name: default_reason(candidate) for candidate in candidates(model)}


def test_the_default_filter():
    found = reasons(Net())
    assert [name for name, reason in found.items() if not reason] == ["block.fc.weight", "block.conv.weight"]
    assert found["block.fc.bias"] == "fewer than two dimensions"
    assert found["embedding_layer.weight"] == "embedding in its name"
    assert found["block.Norm_proj.weight"] == "norm in its name"
    assert found["PE_helper.weight"] == "pe_helper in its name"
    assert found["lm_head.weight"] == "lm_head in its name"
    assert found["wte.weight"] == "belongs to Embedding"
    assert found["bag.weight"] == "belongs to EmbeddingBag"
    assert found["ln.weight"] == "belongs to LayerNorm"


@pytest.mark.parametrize("first", ["embedding", "linear"])
def test_a_weight_tied_to_an_embedding_stays_dense_in_either_order(first):
    table, linear = nn.Embedding(6, 4), nn.Linear(4, 6, bias=False)
    linear.weight = table.weight
    model = nn.Sequential(*([table, linear] if first == "embedding" else [linear, table]))
    assert reasons(model) == {"0.weight": "belongs to Embedding"}


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(3), nn.GroupNorm(1, 4), nn.RMSNorm((2, 3))])
def test_normalisation_modules_stay_dense(norm):
    assert all(reasons(nn.Sequential(norm)).values())


def test_names_and_order_are_torchs():
    model = Net()
    assert [candidate.name for candidate in candidates(model)] == [
        name for name, _ in model.named_parameters()
    ]


def test_a_tied_parameter_is_one_candidate_with_all_its_places():
    model = Net()
    table = next(candidate for candidate in candidates(model) if candidate.name == "wte.weight")
    assert [place.module for place in table.places] == [model.wte, model.head]


def test_a_shared_module_is_one_place():
    layer = nn.Linear(2, 2)
    assert [len(candidate.places) for candidate in candidates(nn.Sequential(layer, layer))] == [1, 1]


@pytest.mark.parametrize("globs", [None, ("*",)])
def test_requires_dense_on_a_parameter_or_a_module_above(globs):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2))
    model[0].weight.requires_dense = True
    model[1].requires_dense = True
    names = list(select(model, globs))
    assert names == (["2.weight"] if globs is None else ["0.bias", "2.weight", "2.bias"])


def test_requires_dense_wins_wherever_a_shared_module_is_met_first():
    shared, protected = nn.Linear(2, 2), nn.Sequential()
    protected.append(shared)
    protected.requires_dense = True
    model = nn.Sequential(shared, protected, nn.Linear(2, 2))
    assert list(select(model, None)) == ["2.weight"]


def test_requires_dense_false_asks_for_nothing():
    layer = nn.Linear(2, 2)
    layer.requires_dense = False
    assert list(select(layer, None)) == ["weight"]


def test_globs_see_the_whole_name_and_case():
    model = Net()
    assert list(select(model, ("block.*.weight",))) == [
        "block.Norm_proj.weight", "block.fc.weight", "block.conv.weight",
    ]  # fmt: skip
    assert list(select(model, ("block.[fc]*.weight", "*Norm_proj.bias"))) == [
        "block.Norm_proj.bias", "block.fc.weight", "block.conv.weight",
    ]  # fmt: skip
    assert list(select(model, ("wte.weight",))) == ["wte.weight"]


@pytest.mark.parametrize("glob", ["fc.weight", "block.FC.weight", "block.norm_proj.*"])
def test_a_part_of_a_name_or_another_case_matches_nothing(glob):
    with pytest.raises(ConfigError, match="it matches no parameter"):
        select(Net(), (glob,))


def test_decisions_carry_their_reason():
    weight, bias = candidates(nn.Linear(2, 2))
    assert [(d.sparse, d.reason) for d in (decide(weight, None), decide(bias, None))] == [
        (True, "default filter: weight of a Linear"),
        (False, "fewer than two dimensions"),
    ]
    assert decide(weight, ("b*", "w*")).reason == "w*"
    assert decide(bias, ("w*",)).reason == "no glob matches"


def test_whole_number_parameters_stay_dense():
    class Quantized(nn.Module):
        def __init__(self):
            super().__init__()
            self.kernel = nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
            self.other = nn.Parameter(torch.zeros(2, 2))

    model = Quantized()
    assert list(select(model, ("*",))) == ["other"]
    assert decide(next(iter(candidates(model))), None).reason == "not floating point"


@pytest.mark.parametrize("good", [("*.weight", ("*.weight",)), (["a", "b"], ("a", "b")), (None, None)])
def test_check_filter_accepts(good):
    assert check_filter(good[0]) == good[1]


@pytest.mark.parametrize("bad", [3, [], [3], "", ["a", ""], {"a"}])
def test_check_filter_refuses(bad):
    with pytest.raises(ConfigError) as caught:
        check_filter(bad)
    assert str(caught.value) == (
        f"param_filter: {bad!r} is not allowed; give a glob or a list of globs "
        '(example: param_filter: "*.ffn.*")'
    )


def test_check_filter_sends_dicts_to_configure():
    with pytest.raises(ConfigError) as caught:
        check_filter({"*": None})
    assert str(caught.value) == (
        "param_filter: a dict of globs is not allowed; "
        "give a glob or a list of globs (dicts go through rarefy.configure)"
    )


def test_a_glob_of_a_list_that_matches_nothing_is_named_with_near_names():
    model = nn.Sequential()
    model.add_module("decoder", nn.Linear(2, 2))
    with pytest.raises(ConfigError) as caught:
        select(model, ("decoder.weight", "*decodr.weight"))
    assert str(caught.value) == (
        "param_filter: '*decodr.weight' (it matches no parameter) is not allowed; "
        "give a glob that matches; parameters with near names: decoder.weight, decoder.bias"
    )


@pytest.mark.parametrize(
    ("model", "globs", "message"),
    [
        (nn.LayerNorm(3), None,
         "param_filter: the default filter (it matches no parameter) is not allowed; "
         "give a glob that matches; parameters with near names: weight"),
        (nn.ReLU(), None,
         "param_filter: the default filter (it matches no parameter) is not allowed; give a model with parameters"),
    ],
)  # fmt: skip
def test_a_filter_that_chooses_nothing(model, globs, message):
    with pytest.raises(ConfigError) as caught:
        select(model, globs)
    assert str(caught.value) == message


def test_globs_that_match_protected_parameters_only():
    layer = nn.Linear(2, 2)
    layer.requires_dense = True
    with pytest.raises(
        ConfigError, match=r"^param_filter: \* \(only dense parameters match\) is not allowed; "
    ):
        select(layer, ("*",))


# ---- what multiplies activations ----


class Vit(nn.Module):
    """Everything that a vision model holds beside its matrices."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.register_tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 8))
        self.layer_scale = nn.Parameter(torch.ones(8, 1, 1))
        self.relative_position_bias_table = nn.Parameter(torch.randn(49, 4))
        self.query_latents = nn.Parameter(torch.randn(4, 8))
        self.A_log = nn.Parameter(torch.randn(8, 4))
        self.gamma = nn.Parameter(torch.ones(2, 8))
        self.patch = nn.Conv2d(3, 8, 4, 4)
        self.head = nn.Linear(8, 10)


class Experts(nn.Module):
    """Mixture of experts as transformers packs them, with a router of its own."""

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(4, 16, 8))
        self.down_proj = nn.Parameter(torch.randn(4, 8, 8))
        self.w1 = nn.Parameter(torch.randn(4, 8, 8))
        self.W_q = nn.Parameter(torch.randn(8, 8))
        self.weight = nn.Parameter(torch.randn(4, 8))
        self.proj_bias = nn.Parameter(torch.randn(4, 8))


def chosen_of(model):
    return [name for name, reason in reasons(model).items() if not reason]


def test_tokens_positions_scales_and_tables_stay_dense():
    found = reasons(Vit())
    assert chosen_of(Vit()) == ["patch.weight", "head.weight"]
    assert found["cls_token"] == "cls_token of a Vit is a vector"
    assert found["pos_embed"] == "pos_embed of a Vit multiplies no activations by its name"
    assert found["A_log"] == "A_log of a Vit multiplies no activations by its name"


def test_experts_and_matrices_of_unknown_modules_are_taken():
    assert chosen_of(Experts()) == ["gate_up_proj", "down_proj", "w1", "W_q", "weight"]


def test_a_name_that_says_nothing_stays_dense_and_is_told_so():
    module = nn.Module()
    module.thing = nn.Parameter(torch.randn(4, 4))
    (found,) = reasons(module).values()
    assert found == "thing of a Module is not known to multiply activations; name it in param_filter"
    assert list(select(module, ("thing",))) == ["thing"]


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LSTM(4, 6, proj_size=3), ["weight_ih_l0", "weight_hh_l0", "weight_hr_l0"]),
        (nn.GRUCell(4, 6), ["weight_ih", "weight_hh"]),
        (nn.MultiheadAttention(8, 2, add_bias_kv=True), ["in_proj_weight", "out_proj.weight"]),
        (
            nn.MultiheadAttention(8, 2, kdim=4, vdim=6),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"],
        ),
        (nn.ConvTranspose2d(4, 2, 3), ["weight"]),
        (nn.Bilinear(3, 4, 5), ["weight"]),
        (nn.Linear(8, 1), ["weight"]),
        (nn.PReLU(4), []),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_modules_of_torch(module, expected):
    assert chosen_of(module) == expected


def test_adapters_stay_dense():
    model = nn.ModuleDict(
        {
            "lora_A": nn.ModuleDict({"default": nn.Linear(4, 2)}),
            "adapter": nn.Linear(4, 2),
            "base_layer": nn.Linear(4, 4),
            "explorer": nn.Linear(4, 4),
        }
    )
    found = reasons(model)
    assert found["lora_A.default.weight"] == found["adapter.weight"] == "belongs to an adapter"
    assert chosen_of(model) == ["base_layer.weight", "explorer.weight"]


# ---- parametrizations ----


def test_weight_norm_is_left_dense_as_it_divides_by_the_norm_of_a_row():
    new = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)))
    assert chosen_of(new) == []
    with pytest.raises(ConfigError, match="_WeightNorm does not keep zeros"):
        select(new, ("*original1",))
    assert reasons(new)["0.parametrizations.weight.original0"] == "a part of the parametrization of weight"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        old = nn.Sequential(nn.utils.weight_norm(nn.Linear(4, 6)))
    assert chosen_of(old) == []
    assert reasons(old)["0.weight_g"] == "weight_g is no weight of a Linear"


def test_parametrizations_that_keep_zeros_are_followed():
    assert chosen_of(nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 6)))) == [
        "0.parametrizations.weight.original"
    ]
    pruned = nn.Linear(4, 6)
    prune.l1_unstructured(pruned, "weight", 0.5)
    assert chosen_of(pruned) == ["weight_orig"]


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Shifted(nn.Module):
    def forward(self, weight):
        return weight + 1


@pytest.mark.parametrize("glob", [None, "*original"])
def test_parametrizations_that_lose_zeros_are_left_or_refused(glob):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    nn.utils.parametrize.register_parametrization(model[1], "weight", Shifted())
    before = model[1].weight.clone()
    if glob is None:
        assert chosen_of(model) == ["0.parametrizations.weight.original", "2.weight"]
        assert reasons(model)["1.parametrizations.weight.original"] == (
            "its parametrization Shifted does not keep zeros"
        )
    else:
        with pytest.raises(ConfigError, match=r"Shifted does not keep zeros.*remove the parametrization"):
            select(model, (glob,))
    assert torch.equal(model[1].weight, before)


def test_a_layer_that_fully_shard_cut_is_called_what_it_was():
    kind = type("FSDPLinear", (nn.Linear,), {})
    weight = next(iter(candidates(nn.Sequential(kind(2, 2)))))
    assert decide(weight, None).reason == "default filter: weight of a Linear"
