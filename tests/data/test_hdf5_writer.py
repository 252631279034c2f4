import sys

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.data import GptHDF5MapConfig, GptHDF5MapDataProcessor, write_hdf5
from rarefy.errors import ConfigError, RarefyError


def write_texts(folder, texts):
    files = []
    for number, text in enumerate(texts):
        files.append(folder / f"{number}.txt")
        files[-1].write_bytes(text)
    return files


def read(files):
    parts: list[np.ndarray] = []
    for file in files:
        with h5py.File(file) as opened:
            data = opened["data"]
            assert isinstance(data, h5py.Dataset)
            parts.append(data[:])
    return np.concatenate(parts)


@settings(max_examples=40, deadline=None)
@given(
    texts=st.lists(st.binary(max_size=30), min_size=1, max_size=4).filter(
        lambda texts: sum(map(len, texts)) > 1
    ),
    length=st.integers(1, 6),
    per_file=st.integers(1, 5),
)
def test_samples_hold_every_token_once(tmp_path_factory, texts, length, per_file):
    folder = tmp_path_factory.mktemp("out")
    files = write_hdf5(
        write_texts(folder, texts), folder / "set", max_sequence_length=length, samples_per_file=per_file
    )
    data, text = read(files), b"".join(texts)
    assert data.dtype == np.int32 and data.shape[1:] == (3, length)
    ids, mask, labels = (data[:, field].ravel() for field in range(3))
    assert bytes(ids[mask == 1].tolist()) == text[:-1]
    assert bytes(labels[mask == 1].tolist()) == text[1:]
    assert np.array_equal(np.sort(mask)[::-1], mask)
    assert all(len(read([file])) == per_file for file in files[:-1])


@settings(max_examples=20, deadline=None)
@given(
    texts=st.lists(st.binary(min_size=1, max_size=30), min_size=1, max_size=4),
    length=st.integers(1, 6),
    per_file=st.integers(1, 5),
)
def test_a_corpus_is_the_text(tmp_path_factory, texts, length, per_file):
    folder = tmp_path_factory.mktemp("out")
    files = write_hdf5(
        write_texts(folder, texts),
        folder / "set",
        max_sequence_length=length,
        samples_per_file=per_file,
        format="corpus",
    )
    assert bytes(read(files).tolist()) == b"".join(texts)
    assert all(len(read([file])) == per_file * length for file in files[:-1])


@pytest.mark.parametrize(("format", "count"), [("samples", 13), ("corpus", 12)])
def test_the_processor_reads_what_was_written(tmp_path, format, count):
    texts = write_texts(tmp_path, [b"some text " * 5])
    write_hdf5(texts, tmp_path / "set", max_sequence_length=4, format=format, samples_per_file=3)
    config = GptHDF5MapConfig(
        data_dir=[str(tmp_path / "set")],
        batch_size=1,
        max_sequence_length=4,
    )
    dataset = GptHDF5MapDataProcessor(config).dataset
    assert len(dataset) == count
    assert bytes(dataset[3]["input_ids"].tolist()) == (b"some text " * 5)[12:16]


def test_long_files_are_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("rarefy.data.hdf5_writer._BLOCK_BYTES", 7)
    texts, calls = write_texts(tmp_path, [b"a" * 20, b"b" * 5]), []
    files = write_hdf5(
        texts,
        tmp_path / "set",
        max_sequence_length=8,
        format="corpus",
        progress=lambda done, total: calls.append((done, total)),
    )
    assert bytes(read(files).tolist()) == b"a" * 20 + b"b" * 5
    assert calls == [(7, 25), (14, 25), (20, 25), (25, 25)]


def test_names_and_an_empty_directory(tmp_path):
    (tmp_path / "set").mkdir()
    files = write_hdf5(
        write_texts(tmp_path, [b"x" * 9]), tmp_path / "set", max_sequence_length=4, samples_per_file=1
    )
    assert files == [tmp_path / "set" / "data-00000.h5", tmp_path / "set" / "data-00001.h5"]
    assert sorted((tmp_path / "set").iterdir()) == files


def make_tokenizer(file):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"one": 0, "two": 1, "three": 70000}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="one"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(file))
    return file


def test_a_tokenizer_file(tmp_path):
    tokenizer, texts = make_tokenizer(tmp_path / "t.json"), write_texts(tmp_path, [b"two three", b"one"])
    files = write_hdf5(
        texts, tmp_path / "set", max_sequence_length=8, tokenizer=tokenizer, format="corpus", progress=None
    )
    assert read(files).tolist() == [1, 70000, 0]


def refused(tmp_path, kind, expected, texts=(b"text",), **options):
    files = options.pop("files", None) or write_texts(tmp_path, texts)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(kind) as error:
        write_hdf5(files, tmp_path / "set", **{"max_sequence_length": 4, **options})
    assert sorted(tmp_path.rglob("*")) == before
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"max_sequence_length": 0}, "max_sequence_length: 0 is not allowed"),
        ({"samples_per_file": 0}, "samples_per_file: 0 is not allowed"),
        ({"format": "parquet"}, "format: 'parquet' is not allowed; give samples or corpus"),
    ],
)
def test_arguments(tmp_path, options, expected):
    refused(tmp_path, ConfigError, expected, **options)


def test_no_files(tmp_path):
    with pytest.raises(ConfigError, match="files: an empty list"):
        write_hdf5([], tmp_path / "set", max_sequence_length=4)


def test_a_directory_that_is_not_empty(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "old.h5").touch()
    refused(tmp_path, ConfigError, "which is not an empty directory")


def test_a_file_in_the_place_of_the_directory(tmp_path):
    (tmp_path / "set").touch()
    refused(tmp_path, ConfigError, "which is not an empty directory")


@pytest.mark.parametrize("texts", [(b"",), (b"x",), (b"", b"")])
def test_too_little_text(tmp_path, texts):
    refused(tmp_path, RarefyError, "fewer than two tokens", texts=texts)


def test_a_missing_file(tmp_path):
    files = [*write_texts(tmp_path, [b"x" * 50]), tmp_path / "absent.txt"]
    expected = "absent.txt: cannot be read (No such file or directory)"
    refused(tmp_path, RarefyError, expected, files=files, samples_per_file=1)
    refused(tmp_path, RarefyError, expected, files=files, progress=lambda done, total: None)


def test_a_missing_file_with_a_tokenizer(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json")
    refused(tmp_path, RarefyError, "absent.txt: cannot", files=[tmp_path / "absent.txt"], tokenizer=tokenizer)


def test_text_that_is_not_utf8(tmp_path):
    tokenizer = make_tokenizer(tmp_path / "t.json")
    refused(tmp_path, RarefyError, "0.txt: is not UTF-8 text", texts=(b"\xff\xfe",), tokenizer=tokenizer)


def test_a_file_that_is_no_tokenizer(tmp_path):
    pytest.importorskip("tokenizers")
    (tmp_path / "t.json").write_text("{}")
    refused(tmp_path, RarefyError, "t.json: is not a tokenizer file", tokenizer=tmp_path / "t.json")


def test_tokenizers_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(tmp_path, RarefyError, "pip install 'rarefy[transformers]'", tokenizer=tmp_path / "t.json")


def test_disk_full(tmp_path, monkeypatch):
    def refuse(_handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", refuse)
    refused(tmp_path, RarefyError, "set: cannot be written ([Errno 28] No space left on device); free space")


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RarefyError, match="cannot be written"):
        write_hdf5(write_texts(tmp_path, [b"text"]), tmp_path / "file" / "set", max_sequence_length=4)


def test_an_interrupt_leaves_nothing(tmp_path):
    def interrupt(_done, _total):
        raise KeyboardInterrupt

    texts = write_texts(tmp_path, [b"x" * 100])
    with pytest.raises(KeyboardInterrupt):
        write_hdf5(texts, tmp_path / "set", max_sequence_length=4, samples_per_file=1, progress=interrupt)
    assert sorted(tmp_path.iterdir()) == texts
