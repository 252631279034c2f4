"""Keys of Model Zoo files that say nothing new to the decoder."""

import pytest

from rarefy.decoder.decoder_config import GPTConfig
from rarefy.errors import ConfigError
from rarefy.models.registry import SILENT, known_keys, read_zoo_keys


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_softmax_fp32", True),
        ("attention_kernel", "optimized_beta"),
        ("boundary_casting", False),
        ("use_vsl", False),
        ("mixture", None),
        ("memory_tokens", None),
        ("cross_attention_layers", []),
        ("rel_distance_mode", "default"),
        ("compute_eval_metrics", True),
    ],
)
def test_values_without_effect(key, value):
    assert read_zoo_keys({key: value, "hidden_size": 3}) == {"hidden_size": 3}


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        (
            "use_vsl",
            True,
            "use_vsl: true is not allowed; give false (rarefy's decoder does not have several texts",
        ),
        (
            "fixed_sparse_attention",
            {"a": 1},
            "give null (rarefy's decoder does not have fixed sparse attention)",
        ),
        ("position_embedding_offset", False, "position_embedding_offset: false is not allowed; give 0 ("),
        ("attention_chunk_size", 0, "attention_chunk_size: 0 is not allowed; give null"),
        ("memory_tokens", {"on": 1}, "give null or {} (rarefy's decoder does not have memory tokens)"),
    ],
)
def test_values_that_cannot_be_honoured_say_what_they_would_mean(key, value, expected):
    with pytest.raises(ConfigError) as error:
        read_zoo_keys({key: value})
    assert expected in str(error.value)


def test_other_spellings():
    assert read_zoo_keys({"residual_dropout_rate": 0.1, "moe_params": {}}) == {"dropout_rate": 0.1, "moe": {}}
    assert read_zoo_keys({"residual_dropout_rate": 0.1, "dropout_rate": 0.1}) == {"dropout_rate": 0.1}
    with pytest.raises(ConfigError, match="residual_dropout_rate: the key beside dropout_rate"):
        read_zoo_keys({"residual_dropout_rate": 0.1, "dropout_rate": 0.2})


def test_no_silent_key_is_one_of_the_decoder():
    assert not SILENT.keys() & GPTConfig.model_fields.keys()
    assert SILENT.keys() < known_keys("gpt2")
