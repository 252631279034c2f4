import sys

import pytest
import torch

from rarefy.data import DigitsConfig, DigitsDataProcessor, build_dataloader
from rarefy.errors import RarefyError


def make(**options):
    pytest.importorskip("sklearn")
    return DigitsDataProcessor(DigitsConfig(batch_size=8, **options))


def test_splits_share_the_images():
    train, validation = make().dataset, make(split="validation").dataset
    assert (len(train), len(validation)) == (1437, 360)
    datasets = pytest.importorskip("sklearn.datasets")
    digits = datasets.load_digits()
    assert validation.labels.tolist() == digits.target[::5].tolist()
    torch.testing.assert_close(train.images[0, 0], torch.from_numpy(digits.images[1]).float() / 16)


def test_batches():
    batch = next(iter(make().create_dataloader()))
    assert batch["images"].shape == (8, 1, 8, 8) and batch["images"].dtype == torch.float32
    assert batch["labels"].shape == (8,) and batch["labels"].dtype == torch.int64
    assert float(batch["images"].min()) >= 0 and float(batch["images"].max()) == 1.0


def test_train_is_shuffled_and_validation_is_not():
    assert make(seed=3).create_dataloader().order.shuffle is True
    assert make(seed=3).create_dataloader().order.seed == 3
    assert make(split="validation").create_dataloader().order.shuffle is False
    assert make(shuffle=False).create_dataloader().order.shuffle is False


def test_by_name():
    pytest.importorskip("sklearn")
    loader = build_dataloader({"data_processor": "DigitsDataProcessor", "batch_size": 100})
    assert len(list(loader)) == 14


def test_scikit_learn_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(RarefyError, match=r"pip install 'rarefy\[digits\]'"):
        DigitsDataProcessor(DigitsConfig(batch_size=8))
