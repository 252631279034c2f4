import multiprocessing
import pickle

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rarefy.data import (
    GptHDF5MapConfig,
    GptHDF5MapDataProcessor,
    ResumableDataLoader,
    build_dataloader,
)
from rarefy.data.hdf5 import HDF5Corpus
from rarefy.data.hdf5_files import HDF5Rows, ReadError
from rarefy.errors import ConfigError, RarefyError


def write(file, data):
    file.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(file, "w") as opened:
        opened.create_dataset("data", data=data)
    return file


def make_samples(count, length=4, start=0):
    ids = (np.arange(start, start + count)[:, None] + np.zeros((1, length))).astype(np.int32)
    return np.stack([ids, np.ones_like(ids), ids + 1], axis=1)


def write_samples(folder, counts=(5, 1, 6), length=4):
    start = 0
    for number, count in enumerate(counts):
        write(folder / f"part-{number}.h5", make_samples(count, length, start))
        start += count
    return folder


def make(folder, default_seed=None, **options):
    config = {"data_processor": "GptHDF5MapDataProcessor", "data_dir": str(folder), "batch_size": 2}
    loader = build_dataloader({**config, **options}, default_seed=default_seed)
    assert isinstance(loader, ResumableDataLoader)
    return loader


def sample_numbers(loader):
    return [int(number) for batch in loader for number in batch["input_ids"][:, 0]]


def message(folder, kind: type[RarefyError] = ConfigError, **options):
    with pytest.raises(kind) as error:
        make(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_fields_of_a_sample(tmp_path):
    data = np.arange(24, dtype=np.int32).reshape(2, 3, 4)
    data[:, 1] = [[1, 1, 0, 0], [1, 0, 1, 0]]
    write(tmp_path / "a.h5", data)
    (batch,) = make(tmp_path)
    for position, name in enumerate(("input_ids", "attention_mask", "labels")):
        assert batch[name].dtype == torch.int64
        assert batch[name].tolist() == data[:, position].tolist()


def test_files_come_in_the_order_of_their_names(tmp_path):
    assert sample_numbers(make(write_samples(tmp_path))) == list(range(12))


def test_only_h5_files_directly_in_the_directory_count(tmp_path):
    write_samples(tmp_path, (4,))
    write(tmp_path / "below" / "part.h5", make_samples(4, start=50))
    write(tmp_path / "part.hdf5", make_samples(4, start=70))
    assert sample_numbers(make(tmp_path)) == [0, 1, 2, 3]


def test_several_directories(tmp_path):
    write(tmp_path / "b" / "x.h5", make_samples(2, start=2))
    write(tmp_path / "a" / "y.h5", make_samples(2, start=0))
    loader = build_dataloader(
        {
            "data_processor": "GptHDF5MapDataProcessor",
            "data_dir": [str(tmp_path / "b"), str(tmp_path / "a")],
            "batch_size": 2,
        }
    )
    assert sample_numbers(loader) == [0, 1, 2, 3]


@pytest.mark.parametrize("epoch", [0, 3])
def test_shuffled_order(tmp_path, epoch):
    loader = make(write_samples(tmp_path), shuffle=True, shuffle_seed=7)
    loader.set_position(epoch)
    expected = torch.randperm(12, generator=torch.Generator().manual_seed(7 + epoch))
    assert sample_numbers(loader) == expected.tolist()


def test_shuffle_seed_defaults_to_the_trainers(tmp_path):
    write_samples(tmp_path)
    assert make(tmp_path, default_seed=5).order.seed == 5
    assert make(tmp_path, default_seed=5, shuffle_seed=1).order.seed == 1
    older = "GptHDF5DataProcessor"
    assert make(tmp_path, default_seed=5, data_processor=older, shuffle_seed=None).order.seed == 5
    assert make(tmp_path, data_processor=older, shuffle_seed=None).order.seed == 0


def test_num_samples_cuts_and_repeats(tmp_path):
    write_samples(tmp_path)
    assert sample_numbers(make(tmp_path, num_samples=4)) == [0, 1, 2, 3]
    assert sample_numbers(make(tmp_path, num_samples=14)) == [*range(12), 0, 1]


def test_drop_last(tmp_path):
    write_samples(tmp_path, (5,))
    assert len(make(tmp_path)) == 2
    assert sample_numbers(make(tmp_path, drop_last=False)) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_any_position_with_any_number_of_workers(tmp_path, workers):
    write_samples(tmp_path)
    whole = make(tmp_path, shuffle=True)
    part = make(tmp_path, shuffle=True, num_workers=workers)
    for position in ((0, 2), (1, 4)):
        whole.set_position(position[0])
        part.set_position(*position)
        assert sample_numbers(part) == sample_numbers(whole)[2 * position[1] :]


@settings(max_examples=25, deadline=None)
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4), length=st.integers(1, 7))
def test_corpus_windows_run_across_files(tmp_path_factory, sizes, length):
    folder, total = tmp_path_factory.mktemp("corpus"), sum(sizes)
    start = 0
    for number, size in enumerate(sizes):
        write(folder / f"{number}.h5", np.arange(start, start + size, dtype=np.uint16))
        start += size
    config = GptHDF5MapConfig(data_dir=[str(folder)], batch_size=1, max_sequence_length=length)
    dataset = GptHDF5MapDataProcessor(config).dataset
    assert len(dataset) == max(total - 1, 0) // length
    for index in range(len(dataset)):
        first = index * length
        assert dataset[index]["input_ids"].tolist() == list(range(first, first + length))
        assert dataset[index]["labels"].tolist() == list(range(first + 1, first + length + 1))
        assert dataset[index]["attention_mask"].tolist() == [1] * length


def test_max_sequence_length_may_repeat_the_length_of_the_samples(tmp_path):
    write_samples(tmp_path)
    assert len(make(tmp_path, max_sequence_length=4)) == 6
    assert "max_sequence_length: 5 is not allowed; give 4, the length" in message(
        tmp_path, max_sequence_length=5
    )


def test_many_files_stay_within_the_bound(tmp_path, monkeypatch):
    monkeypatch.setattr("rarefy.data.hdf5_files._OPEN_FILES", 2)
    rows = HDF5Rows([write(tmp_path / f"{i}.h5", np.array([i])) for i in range(5)])
    assert rows.read(0, 5).tolist() == [0, 1, 2, 3, 4]
    assert len(rows._open) == 2
    assert [int(rows.read(i, i + 1)[0]) for i in (4, 3, 4, 0)] == [4, 3, 4, 0]


def test_a_data_set_can_be_pickled_with_open_files(tmp_path):
    dataset = HDF5Corpus(HDF5Rows([write(tmp_path / "a.h5", np.arange(9))]), 4)
    copied = pickle.loads(pickle.dumps(dataset)) if dataset[0] else None
    assert copied is not None and copied[1]["input_ids"].tolist() == [4, 5, 6, 7]


def read_in_child(rows, queue):
    queue.put((rows.read(0, 3).tolist(), len(rows._open)))


def test_a_forked_process_opens_the_files_for_itself(tmp_path):
    rows = HDF5Rows([write(tmp_path / f"{i}.h5", np.array([i])) for i in range(4)])
    rows.read(3, 4)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(rows, queue))
    child.start()
    assert queue.get(timeout=60) == ([0, 1, 2], 3)
    child.join()


def test_no_such_directory(tmp_path):
    assert "data_dir: " in (text := message(tmp_path / "absent")) and "no such directory" in text


def test_no_files(tmp_path):
    assert "no *.h5 files in it" in message(tmp_path)


def test_an_empty_list_of_directories():
    with pytest.raises(ConfigError, match=r"data_dir: .* give a directory or a list of directories"):
        build_dataloader({"data_processor": "GptHDF5MapDataProcessor", "data_dir": [], "batch_size": 2})


def test_a_file_that_is_not_hdf5(tmp_path):
    write_samples(tmp_path)
    (tmp_path / "part-1.h5").write_bytes(b"not hdf5")
    assert "trainer.fit.train_dataloader.data_dir: " in (text := message(tmp_path)) and "part-1.h5 (" in text


def test_a_truncated_file(tmp_path):
    write_samples(tmp_path)
    file = tmp_path / "part-2.h5"
    file.write_bytes(file.read_bytes()[:-40])
    assert "part-2.h5 (" in message(tmp_path)


def test_no_dataset_of_that_name(tmp_path):
    with h5py.File(tmp_path / "a.h5", "w") as opened:
        opened.create_group("data")
    assert "a.h5 (it has no dataset `data`)" in message(tmp_path)


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (np.zeros((2, 4), np.int32), "[samples, 4]"),
        (np.zeros((2, 5, 4), np.int32), "[samples, 5, 4]"),
        (np.zeros((2, 3, 4), np.float32), "type float32"),
        (np.int32(3), "shape []"),
        (np.full((2, 3, 4), -7, np.int32), "the token id -7"),
        (np.full((2, 3, 4), 9, np.int32), "goes from 9 to 9"),
    ],
)
def test_wrong_data(tmp_path, data, part):
    write(tmp_path / "a.h5", data)
    text = message(tmp_path)
    assert "data_dir: " in text and "a.h5" in text and part in text


def test_files_of_different_shapes(tmp_path):
    write_samples(tmp_path)
    write(tmp_path / "part-3.h5", make_samples(2, length=5))
    text = message(tmp_path)
    assert "part-3.h5 with data of shape [2, 3, 5]" in text and "[3, 4], as in part-0.h5" in text


def test_a_corpus_needs_a_length(tmp_path):
    write(tmp_path / "a.h5", np.arange(50))
    assert "max_sequence_length: null with" in message(tmp_path)


def test_fewer_samples_than_a_batch(tmp_path):
    write_samples(tmp_path, (3,))
    assert "batch_size: 4 with 3 samples in an epoch" in message(tmp_path, batch_size=4)
    assert "batch_size: 4 with 2 samples in an epoch" in message(tmp_path, batch_size=4, num_samples=2)


def test_empty_files(tmp_path):
    write_samples(tmp_path, (0,))
    assert "batch_size: 2 with 0 samples in an epoch" in message(tmp_path)


def test_unsorted_files_are_refused(tmp_path):
    assert "sort_files: false is not allowed; give true" in message(write_samples(tmp_path), sort_files=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_vanishes_later(tmp_path, workers):
    write_samples(tmp_path, (2, 2))
    loader = make(tmp_path, num_workers=workers)
    (tmp_path / "part-1.h5").unlink()
    with pytest.raises(ReadError) as error:
        list(loader)
    text = str(error.value)
    assert text.startswith(f"{tmp_path / 'part-1.h5'}: rows 0 to 1 cannot be read") and "\n" not in text
