"""Positions, attention and experts of the decoder family, each against a naive computation."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from rarefy.decoder.attention import capped_attention, mask_of, visible
from rarefy.decoder.decoder_config import MoEConfig, ParallelConfig
from rarefy.decoder.embedding import Alibi, slopes
from rarefy.decoder.experts import Routing, balance_loss, choose, uniform_choice
from rarefy.decoder.feed_forward import DenseLayer
from rarefy.decoder.rotary import Rotary, rotate
from rarefy.errors import ConfigError
from rarefy.models import GPTConfig, build_model

TINY = {
    "name": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "filter_size": 24,
    "max_position_embeddings": 12,
    "dropout_rate": 0.0,
    "attention_dropout_rate": 0.0,
}
ROTARY = {"position_embedding_type": "rotary", "rotary_dim": 4}
CPU = torch.device("cpu")


def make(**changes):
    torch.manual_seed(0)
    return build_model({**TINY, **changes}).double()


def ids(length=12):
    return torch.randint(32, (3, length), generator=torch.Generator().manual_seed(1))


def batch(length=12):
    return {"input_ids": ids(length), "labels": ids(length).roll(-1, 1)}


def test_rotation_is_a_complex_product():
    config = GPTConfig(hidden_size=16, num_heads=2, **ROTARY)
    heads = torch.randn(2, 2, 5, 8)
    turned = rotate(heads, Rotary(config).rotation(5, CPU))
    pairs = torch.view_as_complex(heads[..., :4].unflatten(-1, (2, 2)).double())
    angles = torch.arange(5).unsqueeze(1) * torch.tensor([1.0, 10000**-0.5])
    expected = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    torch.testing.assert_close(turned[..., :4], expected.float())
    assert torch.equal(turned[..., 4:], heads[..., 4:])


def test_halves_turn_as_adjacent_pairs_in_another_order():
    heads = torch.randn(2, 2, 5, 8)
    rotation = Rotary(GPTConfig(hidden_size=16, num_heads=2, **ROTARY)).rotation(5, CPU)
    order = [0, 2, 1, 3, 4, 5, 6, 7]
    turned = rotate(heads[..., order], rotation, "halves")
    assert torch.equal(turned, rotate(heads, rotation)[..., order])


SCALINGS = [
    ("linear", 4.0, {}, {}),
    (
        "llama3",
        8.0,
        {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
        {},
    ),
    ("yarn", 4.0, {"original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1}, {}),
    (
        "longrope",
        4.0,
        {
            "original_max_position_embeddings": 64,
            "long_factor": [1.0 + i for i in range(8)],
            "short_factor": [1.0] * 8,
        },
        {},
    ),
]


@pytest.mark.parametrize(("kind", "factor", "extra", "more"), SCALINGS)
def test_scaled_frequencies_agree_with_transformers(kind, factor, extra, more):
    pytest.importorskip("transformers")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    sizes = {"hidden_size": 32, "max_position_embeddings": 256}
    config = GPTConfig(
        **sizes,
        num_heads=2,
        position_embedding_type="rotary",
        rotary_dim=16,
        pos_scaling_type=kind,
        pos_scaling_factor=factor,
        pos_scaling_extra_args=extra,
    )
    theirs = LlamaConfig(
        **sizes,
        num_attention_heads=2,
        rope_parameters={"rope_type": kind, "factor": factor, "rope_theta": 10000.0, **extra},
    )
    if kind == "longrope":
        theirs.original_max_position_embeddings = 64
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[kind](theirs, CPU, seq_len=256)
    mine = Rotary(config)
    torch.testing.assert_close(torch.tensor(mine.frequencies), frequencies.float(), rtol=2e-5, atol=0)
    assert mine.magnitude == pytest.approx(magnitude)


def test_longrope_of_the_original_length_takes_the_short_factors():
    extra = {"original_max_position_embeddings": 256, "short_factor": [2.0, 4.0], "long_factor": [9.0, 9.0]}
    config = GPTConfig(
        **ROTARY, max_position_embeddings=256, pos_scaling_type="longrope", pos_scaling_extra_args=extra
    )
    assert Rotary(config).frequencies == pytest.approx((0.5, 0.01 / 4))
    assert Rotary(config).magnitude == 1.0


@given(st.integers(1, 40))
def test_slopes_fall_by_one_factor_and_repeat_none(heads):
    found = slopes(heads)
    assert len(set(found)) == len(found) == heads
    power = 2 ** math.floor(math.log2(heads))
    assert found[:power] == pytest.approx([2 ** (-8 * (i + 1) / power) for i in range(power)])


def test_alibi_slopes_may_be_trained():
    assert not Alibi(4).slopes.requires_grad
    model = make(name="bloom", position_embedding_type="alibi", alibi_trainable_slopes=True)
    model(batch()).backward()
    assert model.model.embedding_layer.position_embed_helper.slopes.grad.abs().sum() > 0


def test_alibi_distances_may_be_scaled():
    torch.testing.assert_close(Alibi(4, scaling=2.0)(5) * 2, Alibi(4)(5))


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 9), window=st.integers(1, 10), sinks=st.integers(0, 3))
def test_visibility_position_by_position(length, window, sinks):
    seen = visible(length, window, sinks, CPU)
    for query in range(length):
        for key in range(length):
            expected = key <= query and (query - key < window or key < sinks)
            assert bool(seen[query, key]) == expected


def test_a_window_that_holds_the_whole_sequence_needs_no_mask():
    assert mask_of(4, 4, 0, None, CPU) is None
    assert mask_of(5, 4, 0, None, CPU) is not None


def logits(model):
    return model.eval().model(ids())


def test_grouped_queries_are_multi_head_attention_with_repeated_keys():
    grouped = make(attention_module="multiquery_attention", extra_attention_params={"num_kv_groups": 2})
    state = grouped.state_dict()
    for name in [name for name in state if "proj_k" in name or "proj_v" in name]:
        heads = state[name].unflatten(0, (2, 4))
        state[name] = heads.repeat_interleave(2, dim=0).flatten(0, 1)
    whole = make()
    whole.load_state_dict(state)
    torch.testing.assert_close(logits(grouped), logits(whole))


def test_multi_query_attention_has_one_key_head_by_default():
    model = make(attention_module="multiquery_attention")
    assert model.state_dict()[
        "model.transformer_decoder.layers.0.self_attn.proj_k_dense_layer.weight"
    ].shape == (
        4,
        16,
    )


def test_the_inner_size_of_attention_is_its_own():
    state = make(attention_inner_dim=32).state_dict()
    prefix = "model.transformer_decoder.layers.0.self_attn"
    assert state[f"{prefix}.proj_q_dense_layer.weight"].shape == (32, 16)
    assert state[f"{prefix}.proj_output_dense_layer.weight"].shape == (16, 32)


def seen_by_the_last(model):
    """Which positions the last logits depend on."""
    model = model.eval()
    embedded = []
    layer = model.model.embedding_layer
    forward = layer.forward
    layer.forward = lambda tokens: embedded.append(forward(tokens).detach().requires_grad_()) or embedded[0]
    model.model(ids())[:, -1].sum().backward()
    return (embedded[0].grad.abs().sum((0, 2)) > 0).tolist()


def test_a_sliding_window_sees_its_length():
    model = make(num_hidden_layers=1, attention_sliding_window_length=3, **ROTARY)
    assert seen_by_the_last(model) == [False] * 9 + [True] * 3


def test_sink_tokens_stay_in_sight_of_gptj_and_not_of_llama(caplog):
    window = {
        "num_hidden_layers": 1,
        "attention_sliding_window_length": 3,
        "attention_sink_tokens": 2,
        **ROTARY,
    }
    assert seen_by_the_last(make(name="gptj", **window)) == [True] * 2 + [False] * 7 + [True] * 3
    assert not caplog.records
    assert seen_by_the_last(make(**window)) == [False] * 9 + [True] * 3
    assert "attention_sink_tokens: as in Model Zoo 2.10" in caplog.text


@pytest.mark.parametrize(
    ("pattern", "windowed"),
    [("full_attention_first", [False, True]), ("sliding_window_first", [True, False])],
)
def test_every_other_layer_has_the_window(pattern, windowed):
    model = make(
        attention_sliding_window_length=3,
        sliding_window_every_other_decoder_layer=True,
        sliding_window_every_other_decoder_layer_pattern=pattern,
    )
    assert [layer.is_windowed for layer in model.model.transformer_decoder.layers] == windowed


def test_capped_scores():
    query, key, value = torch.randn(3, 2, 4, 6, 5).double().unbind()
    scores = (query @ key.transpose(2, 3) / math.sqrt(5) / 0.5).tanh() * 0.5
    hidden = torch.ones(6, 6).triu(1).bool()
    expected = (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ value).transpose(1, 2)
    torch.testing.assert_close(capped_attention(query, key, value, None, 0.5), expected)
    torch.testing.assert_close(capped_attention(query, key, value, ~hidden, 0.5), expected)
    bias = torch.zeros(6, 6).masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(capped_attention(query, key, value, bias, 0.5), expected)


def test_final_logits_are_capped():
    plain = logits(make())
    torch.testing.assert_close(logits(make(final_logit_softcapping=0.01)), 0.01 * torch.tanh(plain / 0.01))


@pytest.mark.parametrize("kind", ["learned", "fixed", "alibi", "rotary", None])
def test_kinds_of_positions(kind):
    model = make(num_hidden_layers=1, position_embedding_type=kind, rotary_dim=4)
    first = logits(model)
    turned = model.model(ids()[:, [1, 0, *range(2, 12)]])[:, -1]
    same = torch.allclose(first[:, -1], turned)
    assert same == (kind is None)


@pytest.mark.parametrize("kind", ["layernorm", "rmsnorm", "biasless-layernorm", "nonparametric-layernorm"])
def test_kinds_of_norms(kind):
    names = [name for name, _ in make(norm_type=kind).named_parameters() if "norm1" in name or "ln_f" in name]
    leaves = {"layernorm": 6, "rmsnorm": 3, "biasless-layernorm": 3, "nonparametric-layernorm": 0}
    assert len(names) == leaves[kind]


@pytest.mark.parametrize(
    "kind",
    [
        "gelu",
        "gelu_new",
        "quick_gelu",
        "squared_gelu",
        "squared_relu",
        "relu",
        "mish",
        "swiglu",
        "reglu",
        "liglu",
    ],
)
def test_nonlinearities_train(kind):
    model = make(nonlinearity=kind)
    model(batch()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["gelu_new", "gelu_fast"])
def test_hooks_see_what_goes_through_a_nonlinearity(name):
    layer, seen = DenseLayer(16, 96, True, name), []
    layer.activation.register_forward_hook(lambda module, inputs, output: seen.append((*inputs, output)))
    hidden = torch.randn(200, 16, requires_grad=True)
    layer(hidden).sum().backward()
    [(before, after)] = seen
    assert torch.equal(before, layer.linear_layer(hidden))
    torch.testing.assert_close(after, functional.gelu(before, approximate="tanh"), rtol=1e-6, atol=1e-6)


def test_parallel_layers_add_both_parts_to_the_input():
    model = make(name="gptj", num_hidden_layers=1, use_untied_layer_norm=True, **ROTARY)
    layer = model.model.transformer_decoder.layers[0]
    hidden = torch.randn(2, 5, 16).double()
    context = model.model._context(5, CPU)
    attended = layer.self_attn(layer.norm1(hidden), context.rotation)
    expected = hidden + attended + layer.ffn(layer.norm3(hidden))
    torch.testing.assert_close(layer(hidden, ids(5), context, []), expected)


def test_scores_may_be_divided_by_the_number_of_the_layer():
    layers = make(scale_qk_dot_by_layer_idx=True).model.transformer_decoder.layers
    assert [layer.self_attn.query_factor for layer in layers] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 0.5),
        ({"attention_type": "dot_product"}, 1.0),
        ({"scale_qk_dot_by_d": True}, 0.25),
        ({"mup_base_hidden_size": 8, "mup_base_filter_size": 8}, 0.25),
        ({"mup_base_hidden_size": 8, "mup_base_filter_size": 8, "scale_qk_dot_by_d": False}, 0.5),
        ({"attention_logits_alpha": 3.0}, 1.5),
    ],
)
def test_scale_of_scores(keys, scale):
    assert GPTConfig(hidden_size=16, num_heads=4, **keys).score_scale == scale


MUP = {"mup_base_hidden_size": 8, "mup_base_filter_size": 6}


@pytest.mark.parametrize(
    ("keys", "scale"),
    [
        ({}, 1.0),
        ({"output_logits_scale": 0.3}, 0.3),
        (MUP, 0.5),
        ({**MUP, "output_logits_alpha": 3.0}, 1.5),
        ({**MUP, "scale_output_logits_by_d": False}, 0.5**0.5),
    ],
)
def test_scale_of_logits(keys, scale):
    assert GPTConfig(hidden_size=16, num_heads=4, **keys).logits_scale == pytest.approx(scale)


EXPERTS = {"name": "mixtral", "moe": {"num_experts": 3, "top_k": 2}, "nonlinearity": "swiglu"}


def expert_names(layout):
    model = make(
        **{**EXPERTS, "moe": {**EXPERTS["moe"], "num_shared_experts": 1, "moe_implementation": layout}}
    )
    prefix = "model.transformer_decoder.layers.0.ffn."
    return {
        n.removeprefix(prefix): tuple(p.shape) for n, p in model.named_parameters() if n.startswith(prefix)
    }


@pytest.mark.parametrize(
    ("layout", "name", "shape"),
    [
        ("experimental", "experts.experts.2.1.linear_layer.weight", (16, 24)),
        ("experimental", "experts.shared_experts.0.ffn.0.linear_layer_for_glu.bias", (24,)),
        ("functional", "experts.experts.3.ffn.0.linear_layer.weight", (24, 16)),
        ("optimized", "experts.fused_ffns.0.linear_layer_for_glu.expert_weights", (24, 4, 16)),
        ("optimized", "experts.fused_ffns.1.linear_layer.expert_biases", (16, 4, 1)),
    ],
)
def test_names_of_the_experts(layout, name, shape):
    names = expert_names(layout)
    assert names["gate.weight"] == (3, 16)
    assert names[name] == shape


def as_fused(state):
    """The state of separate experts in the layout of one tensor a layer."""
    fused = {name: value for name, value in state.items() if ".experts." not in name}
    for layer in range(2):
        here = f"model.transformer_decoder.layers.{layer}.ffn.experts"
        for number in (0, 1):
            for leaf in ("linear_layer", "linear_layer_for_glu")[: 2 - number]:
                names = [f"{here}.experts.{expert}.{number}.{leaf}" for expert in range(3)]
                there = f"{here}.fused_ffns.{number}.{leaf}"
                fused[f"{there}.expert_weights"] = torch.stack([state[f"{n}.weight"] for n in names], 1)
                fused[f"{there}.expert_biases"] = torch.stack(
                    [state[f"{n}.bias"] for n in names], 1
                ).unsqueeze(2)
    return fused


def test_layouts_compute_the_same():
    separate = make(**EXPERTS)
    fused = make(**{**EXPERTS, "moe": {**EXPERTS["moe"], "moe_implementation": "optimized"}})
    fused.load_state_dict(as_fused(separate.state_dict()))
    torch.testing.assert_close(logits(fused), logits(separate))


def test_experts_weigh_their_outputs():
    model = make(**EXPERTS, num_hidden_layers=1)
    block = model.model.transformer_decoder.layers[0].ffn
    hidden = torch.randn(2, 3, 16).double()
    output, routing = block(hidden, ids(3)[:2])
    for sample in range(2):
        for position in range(3):
            token = hidden[sample, position]
            probabilities = block.gate(token).float().softmax(-1)
            best = probabilities.topk(2).indices.tolist()
            total = probabilities[best].sum()
            parts = [probabilities[e] / total * block.experts.run(e, token.unsqueeze(0))[0] for e in best]
            torch.testing.assert_close(output[sample, position], sum(parts).double(), rtol=1e-6, atol=1e-8)
    assert routing.chosen.sum(-1).eq(2).all()


def test_all_experts_at_once_give_the_same_as_their_tokens_only(monkeypatch):
    model = make(**EXPERTS)
    expected = logits(model)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    torch.testing.assert_close(logits(model), expected)


def test_a_null_expert_takes_its_part():
    logits_of = torch.tensor([[[0.0, 1.0]]])
    plain = choose(logits_of, MoEConfig(num_experts=2, top_k=1))
    biased = choose(logits_of, MoEConfig(num_experts=2, top_k=1, null_expert_bias=1.1))
    probability = float(logits_of.softmax(-1)[0, 0, 1])
    assert plain.weights.tolist() == [[[0.0, 1.0]]]
    assert float(biased.weights[0, 0, 1]) == pytest.approx(probability / (probability + 1.1))


def test_sigmoid_weights_without_normalisation():
    moe = MoEConfig(
        num_experts=2, expert_weighting_nonlinearity="sigmoid", expert_weighting_normalization=False
    )
    routing = choose(torch.tensor([[[0.0, 1.0]]]), moe)
    assert float(routing.weights[0, 0, 1]) == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("algorithm", ["hash", "uniform"])
def test_routing_without_a_router(algorithm):
    model = make(**{**EXPERTS, "moe": {"num_experts": 3, "routing_algorithm": algorithm}})
    routings = []
    model.model(ids(), routings)
    expected = ids() % 3 if algorithm == "hash" else torch.arange(12).expand(3, -1) % 3
    assert torch.equal(routings[1].chosen.argmax(-1), expected)
    assert uniform_choice(4, MoEConfig(num_experts=3, top_k=2))[2].tolist() == [1.0, 0.0, 1.0]


def test_probability_before_the_experts():
    first = make(
        **{**EXPERTS, "moe": {"num_experts": 2, "null_expert_bias": 1.0, "probability_before_ffn": True}}
    )
    block = first.model.transformer_decoder.layers[0].ffn
    hidden = torch.randn(1, 4, 16).double()
    output, routing = block(hidden, ids(4)[:1])
    for position in range(4):
        expert = int(routing.chosen[0, position].argmax())
        weight = routing.weights[0, position, expert].double()
        expected = block.experts.run(expert, hidden[:, position] * weight)
        torch.testing.assert_close(output[:, position], expected, rtol=1e-6, atol=1e-8)


def test_the_loss_of_an_uneven_router_is_higher():
    even = Routing(torch.full((1, 4, 2), 0.5), torch.eye(2).repeat(2, 1).unsqueeze(0), torch.ones(1, 4, 2))
    one = torch.tensor([1.0, 0.0]).expand(1, 4, 2)
    mask = torch.tensor([[1.0, 1.0, 1.0, 1.0]])
    assert float(balance_loss([even, even], mask)) == pytest.approx(1.0)
    assert float(balance_loss([Routing(one, one, one)], mask)) == pytest.approx(2.0)
    # Tokens outside the mask do not count: here what is left goes to one expert.
    assert float(balance_loss([even], torch.tensor([[1.0, 0.0, 1.0, 0.0]]))) == pytest.approx(1.0)


def test_the_balance_is_part_of_the_training_loss_only():
    plain = make(**EXPERTS)
    balanced = make(**{**EXPERTS, "moe": {**EXPERTS["moe"], "load_balancing_loss_coef": 0.5}})
    routings = []
    plain.model(ids(), routings)
    share = balance_loss(routings, torch.ones(3, 12))
    torch.testing.assert_close(balanced(batch()), plain(batch()) + 0.5 * share.float())
    torch.testing.assert_close(balanced.eval()(batch()).loss, plain.eval()(batch()).loss)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {**ROTARY, "attention_module": "multiquery_attention", "norm_type": "rmsnorm"},
        {"name": "gptj", **ROTARY},
        {"name": "bloom", "position_embedding_type": "alibi", "embedding_layer_norm": True},
        {"attention_logit_softcapping": 5.0, "norm_first_sandwich": True, **ROTARY},
        {"attention_sliding_window_length": 4},
        EXPERTS,
    ],
)
def test_the_future_is_not_seen_and_copies_compute_the_same(keys):
    model = make(**keys).eval()
    changed = ids()
    changed[:, 7:] = (changed[:, 7:] + 1) % 32
    before = model.model(ids())
    after = model.model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(before[:, 7:], after[:, 7:])
    assert torch.equal(copy.deepcopy(model).model(ids()), before)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"num_heads": 3}, "num_heads: 3 is not allowed; give a divisor of hidden_size (16)"),
        (
            {"attention_inner_dim": 18},
            "num_heads: 4 is not allowed; give a divisor of attention_inner_dim (18)",
        ),
        (
            {"extra_attention_params": {"num_kv_groups": 2}},
            "extra_attention_params.num_kv_groups: 2 is not allowed; give it with attention_module",
        ),
        (
            {"attention_module": "multiquery_attention", "extra_attention_params": {"num_kv_groups": 3}},
            "extra_attention_params.num_kv_groups: 3 is not allowed; give a divisor of num_heads (4)",
        ),
        ({"extra_attention_params": {"groups": 3}}, "extra_attention_params: the key 'groups'"),
        (
            {"position_embedding_type": "rotary", "rotary_dim": 6},
            "rotary_dim: 6 is not allowed; give an even",
        ),
        ({"position_embedding_type": "rotary", "rotary_dim": 3}, "at most 4 (the size of a head)"),
        (
            {"pos_scaling_factor": 2.0},
            "pos_scaling_factor: 2.0 is not allowed; give 1.0, or position_embedding",
        ),
        ({"position_embedding_type": "alibi", "pos_scaling_type": "yarn"}, "give linear with alibi"),
        (
            {"sliding_window_every_other_decoder_layer": True},
            "give false, or attention_sliding_window_length",
        ),
        ({"attention_sink_tokens": 2}, "attention_sink_tokens: 2 is not allowed; give null"),
        ({"mup_base_hidden_size": 8}, "mup_base_filter_size: a missing value is not allowed"),
        ({**MUP, "output_logits_scale": 2.0}, "give output_logits_alpha beside the muP base sizes"),
        (
            {"moe": {"num_experts": 2, "top_k": 3}},
            "moe.top_k: 3 is not allowed; give at most num_experts (2)",
        ),
        ({"moe": {"num_experts": 3, "top_k": 2, "routing_algorithm": "hash"}}, "moe.top_k: 2"),
        (
            {"moe": {"num_experts": 2, "load_balancing_loss_coef": 0.1, "routing_algorithm": "uniform"}},
            "moe.load_balancing_loss_coef: 0.1 is not allowed",
        ),
        (
            {"moe": {"num_experts": 2, "null_expert_bias": 1.0, "expert_weighting_normalization": False}},
            "moe.null_expert_bias: 1.0 is not allowed",
        ),
        (
            {"moe": {"num_experts": 2, "probability_before_ffn": True, "moe_implementation": "optimized"}},
            "moe.probability_before_ffn: true is not allowed",
        ),
        ({"name": "gptj", "norm_first_sandwich": True, **ROTARY}, "norm_first_sandwich: true is not allowed"),
        (
            {**ROTARY, "pos_scaling_type": "yarn"},
            "pos_scaling_extra_args: no original_max_position_embeddings is not allowed",
        ),
        (
            {**ROTARY, "pos_scaling_type": "llama3", "pos_scaling_extra_args": {"beta_fast": 2}},
            "pos_scaling_extra_args: beta_fast is not allowed; give for pos_scaling_type: llama3",
        ),
        (
            {
                **ROTARY,
                "pos_scaling_type": "longrope",
                "pos_scaling_extra_args": {"original_max_position_embeddings": 4, "long_factor": [1.0]},
            },
            "pos_scaling_extra_args.long_factor: [1.0] is not allowed; give a list of 2 numbers",
        ),
    ],
)
def test_keys_that_do_not_go_together(keys, expected):
    with pytest.raises(ConfigError) as error:
        build_model({**TINY, **keys})
    assert expected in str(error.value)
    assert str(error.value).startswith("trainer.init.model.")


def test_a_quarter_of_the_head_turns_by_default():
    assert ParallelConfig(hidden_size=128, num_heads=4).rotary_size == 8
