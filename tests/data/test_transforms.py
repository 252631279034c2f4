"""Samples that are changed when they are read."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from rarefy.data.registry import build_dataloader
from rarefy.errors import ConfigError

SINKS = {"name": "add_sink_tokens", "sink_token_id": 99, "num_sink_tokens": 2}


def folder(path: Path) -> Path:
    ids = np.arange(24, dtype=np.int32).reshape(4, 6)
    data = np.stack([ids, np.ones_like(ids), ids + 1], axis=1)
    with h5py.File(path / "a.h5", "w") as file:
        file["data"] = data
    return path


def batch(path: Path, **options: Any) -> dict[str, torch.Tensor]:
    name = options.pop("data_processor", "GptHDF5MapDataProcessor")
    block = {"data_processor": name, "data_dir": str(folder(path)), "batch_size": 2, **options}
    return next(iter(build_dataloader(block)))


def test_sink_tokens_stand_before_the_text_and_do_not_count(tmp_path: Path) -> None:
    found = batch(tmp_path, data_transforms=[SINKS])
    assert found["input_ids"].tolist()[0] == [99, 99, 0, 1, 2, 3, 4, 5]
    assert found["labels"].tolist()[1] == [99, 99, 7, 8, 9, 10, 11, 12]
    assert found["attention_mask"].tolist()[0] == [0, 0, 1, 1, 1, 1, 1, 1]


def test_samples_may_stay_as_long_as_they_were(tmp_path: Path) -> None:
    transform = {**SINKS, "sink_token_start_pos": 1, "truncate_to_original_length": True}
    assert batch(tmp_path, data_transforms=[transform])["input_ids"].tolist()[0] == [0, 99, 99, 1, 2, 3]


def test_the_largest_token_is_that_of_both(tmp_path: Path) -> None:
    block = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": str(folder(tmp_path)), "batch_size": 2}
    for token, expected in ((99, 99), (1, 24)):
        transforms = [{**SINKS, "sink_token_id": token}]
        loader: Any = build_dataloader({**block, "data_transforms": transforms})
        assert loader.dataset.largest_token() == expected


def test_the_older_name_of_the_processor(tmp_path: Path) -> None:
    keys = {
        "shuffle_seed": None,
        "shuffle_buffer": 7,
        "features_list": ["input_ids", "attention_mask", "labels"],
    }
    found = batch(tmp_path, data_processor="GptHDF5DataProcessor", vocab_size=50, use_vsl=False, **keys)
    assert found["input_ids"].tolist()[0] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"data_transforms": [{"name": "add_memory_tokens"}]}, "data_transforms"),
        (
            {"data_transforms": [{**SINKS, "sink_token_start_pos": 7}]},
            "sink_token_start_pos: 7 is not allowed",
        ),
        ({"use_vsl": True}, "use_vsl: true is not allowed; give false (several texts"),
        (
            {"mixture": [{"data_dir": "a", "weight": 1}]},
            "mixture: a list of weighted data sets is not allowed",
        ),
        ({"pad_last": True}, "pad_last: true is not allowed"),
        (
            {"data_processor": "GptHDF5DataProcessor", "features_list": ["labels"]},
            "features_list: ['labels'] is not allowed; give [input_ids, attention_mask, labels]",
        ),
    ],
)
def test_what_is_refused(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as error:
        batch(tmp_path, **options)
    assert expected in str(error.value)
