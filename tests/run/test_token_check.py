"""Token ids outside of the vocabulary are named before training."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np
import pytest
from torch import nn

from rarefy.data import build_dataloader
from rarefy.errors import ConfigError
from rarefy.run.builder import check_tokens


class Vocabulary(nn.Module):
    """A model that tells its vocabulary."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.config = type("Config", (), {"vocab_size": size})()


def corpus(folder: Path, tokens: np.ndarray, **options: object):
    with h5py.File(folder / "a.h5", "w") as file:
        file["data"] = tokens
    block = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": str(folder), "batch_size": 2, **options}
    return build_dataloader(block, default_seed=0)


def test_a_late_id_of_a_corpus_is_found(tmp_path):
    tokens = np.zeros(100, np.int32)
    tokens[90] = 700
    data = corpus(tmp_path, tokens, max_sequence_length=4)
    check_tokens(Vocabulary(701), data, "fit.train_dataloader")
    with pytest.raises(ConfigError) as error:
        check_tokens(Vocabulary(700), data, "fit.train_dataloader")
    assert str(error.value) == (
        "fit.train_dataloader: data with the token id 700 is not allowed; give ids below the model's vocab_size, "
        "700, or a larger vocab_size (example: vocab_size: 701)"
    )


def test_ids_and_labels_of_samples_count_and_loss_masks_do_not(tmp_path):
    samples = np.ones((6, 3, 4), np.int32)
    samples[5, 2, 3] = 9
    data = corpus(tmp_path, samples)
    check_tokens(Vocabulary(10), data, "data")
    with pytest.raises(ConfigError, match="the token id 9"):
        check_tokens(Vocabulary(9), data, "data")


def test_a_text_corpus_needs_its_bytes(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("z" * 100)
    block = {"data_processor": "TextCorpusDataProcessor", "source": f"{tmp_path}/*.txt"}
    data = build_dataloader({**block, "sequence_length": 4, "batch_size": 2}, default_seed=0)
    check_tokens(Vocabulary(ord("z") + 1), data, "data")
    with pytest.raises(ConfigError, match=f"the token id {ord('z')}"):
        check_tokens(Vocabulary(ord("z")), data, "data")


def test_what_does_not_tell_is_not_checked():
    check_tokens(nn.Linear(2, 2), [1], "data")
    check_tokens(Vocabulary(1), [1], "data")


def test_very_large_data_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("rarefy.data.hdf5_files._SCANNED", 50)
    data = corpus(tmp_path, np.full(100, 9, np.int32), max_sequence_length=4)
    check_tokens(Vocabulary(2), data, "data")
