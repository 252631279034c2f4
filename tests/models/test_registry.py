import pytest
import torch
from torch import nn

from rarefy.errors import ConfigError
from rarefy.models import ChecksBatch, GPTModel, ReportsMetrics, build_model

SMALL = {"vocab_size": 32, "hidden_size": 16, "num_heads": 4, "num_hidden_layers": 1, "filter_size": 24}


def message(config, **options):
    with pytest.raises(ConfigError) as error:
        build_model(config, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["gpt2", "gpt3", "GPT3"])
def test_names(name):
    model = build_model({"name": name, **SMALL})
    assert isinstance(model, GPTModel)
    assert isinstance(model, ReportsMetrics) and isinstance(model, ChecksBatch)
    assert model.config.filter_size == 24


def test_the_map_is_not_changed():
    config = {"name": "gpt2", **SMALL}
    build_model(config)
    assert config == {"name": "gpt2", **SMALL}


def test_keys_of_a_model_zoo_file():
    initializer = {"mean": 0.0, "name": "truncated_normal", "std": 0.02, "a": -0.04, "b": 0.04}
    config = {
        "name": "gpt3",
        **SMALL,
        "position_embedding_type": "learned",
        "share_embedding_weights": True,
        "max_position_embeddings": 2048,
        "dropout_rate": 0.0,
        "embedding_dropout_rate": 0,
        "layer_norm_epsilon": 1.0e-5,
        "attention_type": "scaled_dot_product",
        "attention_dropout_rate": 0.0,
        "use_projection_bias_in_attention": True,
        "use_ffn_bias_in_attention": True,
        "nonlinearity": "gelu",
        "use_ffn_bias": True,
        "embedding_initializer": initializer,
        "initializer": initializer,
        "output_layer_initializer": initializer,
        "loss_scaling": "num_tokens",
        "loss_weight": 1,
        "use_bias_in_output": False,
        "mixed_precision": True,
        "fp16_type": "cbfloat16",
    }
    assert isinstance(build_model(config), GPTModel)


def test_class_from_a_module():
    model = build_model({"name": "torch.nn:Linear", "in_features": 3, "out_features": 2})
    assert isinstance(model, nn.Linear) and model.weight.shape == (2, 3)


def test_class_from_a_file_beside_the_configuration(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\nclass Net(nn.Module):\n"
        "    def __init__(self, width):\n"
        "        super().__init__()\n        self.layer = nn.Linear(width, 1)\n"
    )
    model = build_model({"name": "./mine.py:Net", "width": 5}, base_dir=tmp_path)
    assert model.state_dict()["layer.weight"].shape == (1, 5)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "trainer.init.model.name: a model without a name is not allowed"),
        ({"name": 3}, "trainer.init.model.name: 3 is not allowed"),
        ("gpt2", "trainer.init.model: 'gpt2' is not allowed; give a map with a name"),
        ({"name": "gtp2"}, "did you mean gpt2?"),
        ({"name": "gpt2", "hiden_size": 3}, "did you mean hidden_size?"),
        ({"name": "gpt2", "hidden_size": "big"}, "trainer.init.model.hidden_size: 'big' is not allowed"),
        ({"name": "gpt2", "hidden_size": True}, "trainer.init.model.hidden_size: true is not allowed"),
        ({"name": "gpt2", "num_hidden_layers": 0}, "trainer.init.model.num_hidden_layers: 0 is not allowed"),
        ({"name": "gpt2", "dropout_rate": 1.5}, "trainer.init.model.dropout_rate: 1.5 is not allowed"),
        ({"name": "gpt2", "layer_norm_epsilon": float("nan")}, "layer_norm_epsilon: nan is not allowed"),
        (
            {"name": "gpt2", "position_embedding_type": "relative"},
            "position_embedding_type: 'relative' is not allowed; give learned, fixed, rotary, alibi or null",
        ),
        (
            {"name": "gpt2", "initializer": {"std": -1}},
            "trainer.init.model.initializer.std: -1 is not allowed",
        ),
        ({"name": "gpt2", "initializer": {"sd": 1}}, "trainer.init.model.initializer.sd"),
        ({"name": "gpt2", "num_heads": 5}, "trainer.init.model.num_heads: 5 is not allowed; give a divisor"),
        ({"name": "no_such:Net"}, "trainer.init.model.name: the module 'no_such'"),
        ({"name": "torch:pi"}, "trainer.init.model.name: torch:pi (3.14"),
        ({"name": "builtins:dict"}, "trainer.init.model.name: builtins:dict, which returns {},"),
        ({"name": "torch.nn:Linear", "width": 3}, "trainer.init.model: torch.nn:Linear with these arguments"),
        ({"name": "torch.nn:Linear"}, "missing 2 required positional arguments"),
    ],
)
def test_errors(config, expected):
    assert expected in message(config)


def test_path_is_the_callers():
    assert message({"name": "gpt2", "num_heads": 5}, path="here").startswith("here.num_heads: ")


def test_imports_refused():
    assert "imports are off" in message({"name": "torch.nn:Linear"}, allow_imports=False)


def make_hugging_face(kind, **changes):
    pytest.importorskip("transformers")
    config = {"vocab_size": 32, "n_embd": 16, "n_head": 2, "n_layer": 1, "n_positions": 8, **changes}
    return build_model({"name": f"transformers:{kind}", "config": config})


def test_hugging_face_causal_model():
    model = make_hugging_face("GPT2LMHeadModel", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :-1], "labels": ids[:, 1:], "attention_mask": torch.ones(2, 8)}
    logits = model.get_submodule("model")(input_ids=ids[:, :-1]).logits
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(model(batch), expected)
    torch.testing.assert_close(model.eval()(batch).loss, expected)
    assert isinstance(model, ReportsMetrics) and isinstance(model, ChecksBatch)
    assert set(model.eval_metrics().compute()) == {"eval/loss", "eval/lm_perplexity", "eval/accuracy"}
    with pytest.raises(ConfigError, match="the token id 32"):
        model.check_batch({**batch, "labels": torch.full((2, 8), 32)})


def test_hugging_face_model_of_another_kind():
    model = make_hugging_face("GPT2ForSequenceClassification", pad_token_id=0)
    outputs = model({"input_ids": torch.ones(2, 4).long(), "labels": torch.tensor([0, 1])})
    assert outputs.loss.ndim == 0


def test_hugging_face_config_object():
    transformers = pytest.importorskip("transformers")
    options = transformers.GPT2Config(vocab_size=32, n_embd=16, n_head=2, n_layer=1)
    model = build_model({"name": "transformers:GPT2LMHeadModel", "config": options})
    assert model.vocab_size == 32
