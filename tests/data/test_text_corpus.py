import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rarefy.data import TextCorpusConfig, TextCorpusDataProcessor
from rarefy.data.text_corpus import ByteWindows, split_names
from rarefy.errors import ConfigError

NAMES = st.lists(st.text("abcd/", min_size=1, max_size=6), unique=True, max_size=60)


def make(folder, **options):
    config = TextCorpusConfig(source=f"{folder}/**/*.txt", sequence_length=4, batch_size=2, **options)
    return TextCorpusDataProcessor(config)


def write(folder, count=12, length=50):
    for number in range(count):
        (folder / f"{number:02}.txt").write_bytes(bytes([65 + number]) * length)
    return folder


@given(NAMES)
def test_splits_share_the_files(names):
    train, validation = split_names(names, "train"), split_names(names, "validation")
    assert sorted(train + validation) == sorted(names)
    assert bool(train) == (len(names) >= 1) and bool(validation) == (len(names) >= 2)


def test_the_split_of_a_file_does_not_depend_on_the_others():
    names = [f"package/module_{number}.py" for number in range(2000)]
    validation = split_names(names, "validation")
    assert 60 <= len(validation) <= 140
    assert set(split_names(names[:1000], "validation")) == set(validation) & set(names[:1000])


@given(tokens=st.binary(max_size=60), length=st.integers(1, 9))
def test_windows_cover_the_text_with_labels_one_ahead(tokens, length):
    windows = ByteWindows(torch.tensor(list(tokens), dtype=torch.uint8), length)
    samples = [windows[index] for index in range(len(windows))]
    ids = [token for sample in samples for token in sample["input_ids"].tolist()]
    labels = [token for sample in samples for token in sample["labels"].tolist()]
    assert len(ids) == len(labels) > len(tokens) - 1 - length
    assert ids == list(tokens[: len(ids)]) and labels == list(tokens[1 : len(ids) + 1])
    assert all(sample["attention_mask"].tolist() == [1] * length for sample in samples)


def test_batches(tmp_path):
    loader = make(write(tmp_path), shuffle=False).create_dataloader()
    batch = next(iter(loader))
    assert {name: (value.shape, value.dtype) for name, value in batch.items()} == dict.fromkeys(
        ["input_ids", "labels", "attention_mask"], ((2, 4), torch.int64)
    )


def test_files_are_joined_in_the_order_of_their_names(tmp_path):
    processor = make(write(tmp_path))
    expected = b"".join((tmp_path / name).read_bytes() for name in sorted(processor.names))
    assert bytes(processor.dataset.tokens.tolist()) == expected
    assert len(processor.names) == 12 - len(make(tmp_path, split="validation").names)


def test_names_are_relative_to_the_fixed_part_of_the_glob(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.txt", "a/b/2.txt", "a/b/3.txt"):
        (tmp_path / name).write_text("some text")
    monkeypatch.chdir(tmp_path)
    near, far = make("./a"), make(tmp_path / "a")
    assert near.names == far.names and set(near.names) <= {"1.txt", "b/2.txt", "b/3.txt"}


def test_train_is_shuffled_and_validation_is_not(tmp_path):
    write(tmp_path, length=500)
    assert make(tmp_path).create_dataloader().order.shuffle is True
    assert make(tmp_path, split="validation").create_dataloader().order.shuffle is False
    assert make(tmp_path, shuffle=False).create_dataloader().order.shuffle is False
    assert make(tmp_path, seed=9).create_dataloader().order.seed == 9


def test_standard_library():
    train = TextCorpusDataProcessor(TextCorpusConfig(sequence_length=64, batch_size=8))
    config = TextCorpusConfig(sequence_length=64, batch_size=8, split="validation")
    validation = TextCorpusDataProcessor(config)
    sizes = len(train.dataset.tokens), len(validation.dataset.tokens)
    assert sum(sizes) > 5_000_000
    assert 0.01 < sizes[1] / sum(sizes) < 0.2
    root = Path(sysconfig.get_path("stdlib"))
    assert all((root / name).is_file() for name in validation.names)
    assert not [name for name in train.names if "site-packages" in name or name.startswith("test/")]


def test_no_files(tmp_path):
    with pytest.raises(
        ConfigError, match=r"^source: .*no files match\) is not allowed; give python_stdlib or a glob"
    ):
        make(tmp_path)


def test_one_file_cannot_be_shared(tmp_path):
    write(tmp_path, count=1)
    assert make(tmp_path).names == ["00.txt"]
    with pytest.raises(ConfigError, match=r"^source: .* with 1 file is not allowed; give two or more files"):
        make(tmp_path, split="validation")


def test_unreadable_file(tmp_path, monkeypatch):
    write(tmp_path)

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("numpy.fromfile", refuse)
    with pytest.raises(ConfigError, match=r"^source: .*00\.txt \(Permission denied\) is not allowed"):
        make(tmp_path)


def test_empty_files(tmp_path):
    write(tmp_path, length=0)
    with pytest.raises(ConfigError, match=r"^batch_size: 2 with 0 samples"):
        make(tmp_path).create_dataloader()
