import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from rarefy.errors import ConfigError
from rarefy.models import GPTConfig, GPTModel, InitializerConfig, LanguageModelOutput

SMALL = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_heads": 4,
    "num_hidden_layers": 2,
    "filter_size": 24,
    "max_position_embeddings": 8,
}


def make(**changes):
    torch.manual_seed(0)
    return GPTModel(GPTConfig(**{**SMALL, "dropout_rate": 0.0, "attention_dropout_rate": 0.0, **changes}))


def make_batch(batch=3, length=8, vocabulary=32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(vocabulary, (batch, length + 1), generator=generator)
    mask = torch.randint(2, (batch, length), generator=generator)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": mask}


def expected_shapes(layers, hidden, filter_size, vocabulary, positions):
    shapes = {
        "model.embedding_layer.word_embeddings.weight": (vocabulary, hidden),
        "model.embedding_layer.position_embeddings.embed.weight": (positions, hidden),
        "model.ln_f.weight": (hidden,),
        "model.ln_f.bias": (hidden,),
    }
    for layer in range(layers):
        prefix = f"model.transformer_decoder.layers.{layer}"
        for name in ("proj_q", "proj_k", "proj_v", "proj_output"):
            shapes[f"{prefix}.self_attn.{name}_dense_layer.weight"] = (hidden, hidden)
            shapes[f"{prefix}.self_attn.{name}_dense_layer.bias"] = (hidden,)
        shapes[f"{prefix}.ffn.ffn.0.linear_layer.weight"] = (filter_size, hidden)
        shapes[f"{prefix}.ffn.ffn.0.linear_layer.bias"] = (filter_size,)
        shapes[f"{prefix}.ffn.ffn.1.linear_layer.weight"] = (hidden, filter_size)
        shapes[f"{prefix}.ffn.ffn.1.linear_layer.bias"] = (hidden,)
        for norm in ("norm1", "norm3"):
            shapes[f"{prefix}.{norm}.weight"] = shapes[f"{prefix}.{norm}.bias"] = (hidden,)
    return shapes


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def test_parameter_names_and_shapes():
    assert shapes_of(make()) == expected_shapes(2, 16, 24, 32, 8)


def test_default_config_is_gpt2_small():
    with torch.device("meta"):
        model = GPTModel(GPTConfig())
    assert shapes_of(model) == expected_shapes(12, 768, 3072, 50257, 1024)
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808


def test_untied_head_with_bias():
    shapes = shapes_of(make(share_embedding_weights=False, use_bias_in_output=True))
    assert shapes["model.lm_head.weight"] == (32, 16)
    assert shapes["model.lm_head.bias"] == (32,)


def test_biases_can_be_left_out():
    names = shapes_of(
        make(use_projection_bias_in_attention=False, use_ffn_bias_in_attention=False, use_ffn_bias=False)
    )
    assert not [name for name in names if name.endswith("layer.bias")]


def test_tied_weights_are_one_parameter_and_stay_so_in_a_copy():
    for model in (make(), copy.deepcopy(make())):
        assert model.model.lm_head.weight is model.model.embedding_layer.word_embeddings.weight
        assert "model.lm_head.weight" in model.state_dict()


def naive_logits(model, ids):
    decoder, heads = model.model, model.config.num_heads
    length = ids.shape[1]
    table = decoder.embedding_layer
    hidden = table.word_embeddings.weight[ids] + table.position_embeddings.embed.weight[:length]
    future = torch.ones(length, length).triu(1).bool()
    for layer in decoder.transformer_decoder.layers:
        attention, source = layer.self_attn, layer.norm1(hidden)
        parts = []
        for head in range(heads):
            size = source.shape[2] // heads
            rows = slice(head * size, (head + 1) * size)
            query = attention.proj_q_dense_layer(source)[..., rows]
            key = attention.proj_k_dense_layer(source)[..., rows]
            value = attention.proj_v_dense_layer(source)[..., rows]
            scores = query @ key.transpose(1, 2) / math.sqrt(size)
            parts.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ value)
        hidden = hidden + attention.proj_output_dense_layer(torch.cat(parts, -1))
        wide = layer.ffn.ffn[0].linear_layer(layer.norm3(hidden))
        wide = wide * 0.5 * (1 + torch.erf(wide / math.sqrt(2)))
        hidden = hidden + layer.ffn.ffn[1].linear_layer(wide)
    return decoder.ln_f(hidden) @ decoder.lm_head.weight.T


def test_logits_agree_with_a_naive_decoder():
    model, batch = make().double(), make_batch()
    torch.testing.assert_close(model.model(batch["input_ids"]), naive_logits(model, batch["input_ids"]))


def test_the_future_is_not_seen():
    model, ids = make(), make_batch()["input_ids"]
    changed = ids.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 32
    before, after = model.model(ids), model.model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def naive_loss_sum(model, batch, mask):
    logs = naive_logits(model, batch["input_ids"]).detach().log_softmax(-1)
    total = 0.0
    for row in range(len(mask)):
        for column in range(mask.shape[1]):
            total -= float(logs[row, column, batch["labels"][row, column]]) * float(mask[row, column])
    return total


@pytest.mark.parametrize(
    ("scaling", "weight"),
    [("num_tokens", 1.0), ("num_tokens", 3.0), ("batch_size", 1.0), ("batch_size", 0.25)],
)
def test_loss_agrees_with_a_naive_sum(scaling, weight):
    model, batch = make(loss_scaling=scaling, loss_weight=weight), make_batch()
    mask = batch["attention_mask"]
    total = naive_loss_sum(model, batch, mask)
    expected = total / float(mask.sum()) if scaling == "num_tokens" else total / 3 * weight
    assert float(model(batch).detach()) == pytest.approx(expected, rel=1e-4)


def test_loss_mask_may_have_either_name_or_none():
    model, batch = make(), make_batch()
    renamed = {**batch, "loss_mask": batch["attention_mask"]}
    renamed["attention_mask"] = torch.ones_like(batch["attention_mask"])
    assert torch.equal(model(renamed), model(batch))
    plain = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    total = naive_loss_sum(model, batch, torch.ones(3, 8))
    assert float(model(plain).detach()) == pytest.approx(total / 24, rel=1e-5)


def test_labels_outside_the_mask_do_not_count():
    model, batch = make(), make_batch()
    other = {**batch, "labels": batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)}
    assert torch.equal(model(other), model(batch))


def test_a_batch_without_tokens_has_loss_zero():
    batch = {**make_batch(), "attention_mask": torch.zeros(3, 8, dtype=torch.int32)}
    assert float(make()(batch).detach()) == 0.0


def test_int32_batches():
    model, batch = make(), make_batch()
    assert torch.equal(model({name: value.int() for name, value in batch.items()}), model(batch))


def test_loss_is_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert make()(make_batch()).dtype == torch.float32


def test_eval_mode_returns_the_sums():
    model, batch = make().eval(), make_batch()
    outputs = model(batch)
    assert isinstance(outputs, LanguageModelOutput)
    assert torch.equal(outputs.loss, model.train()(batch))
    logits = model.model(batch["input_ids"])
    right = (logits.argmax(-1) == batch["labels"]) & (batch["attention_mask"] == 1)
    assert int(outputs.correct) == int(right.sum())
    assert int(outputs.weight) == int(batch["attention_mask"].sum())


def weights(model, ending):
    return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if n.endswith(ending)])


def truncated_std(std):
    density = math.exp(-2) / math.sqrt(2 * math.pi)
    return std * math.sqrt(1 - 4 * density / math.erf(math.sqrt(2)))


WIDE = {"hidden_size": 128, "filter_size": 256, "vocab_size": 500, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    ("ending", "std"),
    [
        ("embeddings.weight", 0.02),
        ("embed.weight", 0.02),
        ("q_dense_layer.weight", 0.02),
        ("0.linear_layer.weight", 0.02),
        ("output_dense_layer.weight", 0.02 / math.sqrt(6)),
        ("1.linear_layer.weight", 0.02 / math.sqrt(6)),
    ],
)
def test_default_initialisers(ending, std):
    drawn = weights(make(**WIDE), ending)
    assert float(drawn.std()) == pytest.approx(truncated_std(std), rel=0.06)
    assert float(drawn.abs().max()) <= 2 * std * (1 + 1e-6)


def test_given_initialisers_go_where_they_belong():
    model = make(
        **WIDE,
        share_embedding_weights=False,
        initializer={"name": "truncated_normal", "std": 0.05, "mean": 10.0},
        embedding_initializer={"std": 0.05, "mean": 20.0},
        output_layer_initializer={"mean": 30.0, "std": 1.0, "a": 29.5, "b": 30.5},
    )
    means = {
        "q_dense_layer.weight": 10,
        "0.linear_layer.weight": 10,
        "lm_head.weight": 10,
        "embed.weight": 20,
    }
    means |= {"embeddings.weight": 20, "output_dense_layer.weight": 30, "1.linear_layer.weight": 30}
    for ending, mean in means.items():
        assert float(weights(model, ending).mean()) == pytest.approx(mean, abs=0.02)
    bounded = weights(model, "output_dense_layer.weight")
    assert float(bounded.min()) >= 29.5 and float(bounded.max()) <= 30.5


def test_biases_start_at_zero_and_norms_at_one():
    for name, parameter in make().named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif "norm" in name or "ln_f" in name:
            assert bool((parameter == 1).all())


def test_the_seed_decides_the_weights():
    first, second = make().state_dict(), make().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_dropout_only_in_train_mode():
    model, ids = make(dropout_rate=0.5, attention_dropout_rate=0.5), make_batch()["input_ids"]
    assert not torch.equal(model.model(ids), model.model(ids))
    model.eval()
    assert torch.equal(model.model(ids), model.model(ids))


@pytest.mark.parametrize("rates", [(0.0, None, 0.0), (0.3, None, 0.3), (0.3, 0.0, 0.0)])
def test_embedding_dropout_follows_dropout_rate(rates):
    dropout, embedding, expected = rates
    model = make(dropout_rate=dropout, embedding_dropout_rate=embedding)
    assert model.model.embedding_layer.dropout.p == expected


def test_attention_dropout_is_its_own_rate():
    model, ids = make(attention_dropout_rate=0.5), make_batch()["input_ids"]
    assert not torch.equal(model.model(ids), model.model(ids))


def test_layer_norm_epsilon():
    norms = [
        module.eps for module in make(layer_norm_epsilon=1e-3).modules() if isinstance(module, nn.LayerNorm)
    ]
    assert norms == [1e-3] * 5


@settings(max_examples=10, deadline=None)
@given(heads=st.integers(1, 4), size=st.integers(1, 4), layers=st.integers(1, 3), length=st.integers(1, 6))
def test_every_parameter_gets_a_gradient(heads, size, layers, length):
    model = make(hidden_size=heads * size, num_heads=heads, num_hidden_layers=layers)
    batch = {name: value[:, :length] for name, value in make_batch().items() if name != "attention_mask"}
    model(batch).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("bad", [-1, 32])
@pytest.mark.parametrize("name", ["input_ids", "labels"])
def test_token_ids_outside_the_vocabulary(name, bad):
    model, batch = make(), make_batch()
    batch["attention_mask"] = torch.ones(3, 8)
    batch[name] = batch[name].clone()
    batch[name][1, 2] = bad
    message = rf"^batch\.{name}: the token id {bad} is .* ids from 0 to 31, .*vocab_size \(32\)"
    for call in (model, model.check_batch):
        with pytest.raises(ConfigError, match=message):
            call(batch)


def test_a_batch_that_suits_the_model_passes():
    assert make().check_batch(make_batch()) is None
    empty = {"input_ids": torch.zeros(0, 8).long(), "labels": torch.zeros(0, 8).long()}
    assert make().check_batch(empty) is None


def test_sequence_too_long():
    with pytest.raises(ConfigError, match=r"9 tokens .* at most 8 tokens.*max_position_embeddings"):
        make()(make_batch(length=9))


@pytest.mark.parametrize("batch", [{"input_ids": torch.zeros(1, 2)}, torch.zeros(1, 2), [1], {}])
def test_batch_without_its_fields(batch):
    with pytest.raises(ConfigError, match=r"give a dict with input_ids and labels"):
        make()(batch)


@pytest.mark.parametrize("name", ["labels", "loss_mask", "attention_mask"])
def test_shapes_that_differ(name):
    batch = {**make_batch(), name: torch.zeros(3, 7).long()}
    with pytest.raises(ConfigError, match=rf"^batch\.{name}: the shape \[3, 7\]"):
        make()(batch)


def test_ids_of_one_dimension():
    with pytest.raises(ConfigError, match=r"^batch\.input_ids: the shape \[4\]"):
        make()({"input_ids": torch.zeros(4).long(), "labels": torch.zeros(4).long()})


def test_heads_that_do_not_divide():
    with pytest.raises(ConfigError, match=r"^num_heads: 3 is .* a divisor of hidden_size \(16\)"):
        make(num_heads=3)


@pytest.mark.parametrize("bounds", [{"a": 0.1}, {"b": -0.1}, {"a": 1.0, "b": 1.0}])
@pytest.mark.parametrize("name", ["initializer", "embedding_initializer", "output_layer_initializer"])
def test_initialiser_without_an_interval(name, bounds):
    with pytest.raises(ConfigError, match=rf"^{name}: the interval from"):
        make(**{name: bounds})


def test_an_initialiser_fills_in_place():
    weight = torch.empty(1000)
    InitializerConfig(mean=5.0, std=0.1).fill_(weight)
    assert float(weight.min()) >= 4.8 and float(weight.max()) <= 5.2
