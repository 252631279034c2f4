import pytest
import torch

from rarefy.data import DATA_PROCESSORS, ResumableDataLoader, build_dataloader
from rarefy.errors import ConfigError

CORPUS = {
    "data_processor": "TextCorpusDataProcessor",
    "sequence_length": 64,
    "batch_size": 4,
    "split": "validation",
}


def message(config, **options):
    with pytest.raises(ConfigError) as error:
        build_dataloader(config, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["TextCorpusDataProcessor", "textcorpusdataprocessor"])
def test_names(name):
    assert isinstance(build_dataloader({**CORPUS, "data_processor": name}), ResumableDataLoader)


@pytest.mark.parametrize(("given", "default", "expected"), [({}, None, 0), ({}, 3, 3), ({"seed": 1}, 3, 1)])
def test_seed_defaults(given, default, expected):
    loader = build_dataloader({**CORPUS, **given}, default_seed=default)
    assert isinstance(loader, ResumableDataLoader) and loader.order.seed == expected


def test_the_map_is_not_changed():
    config = dict(CORPUS)
    build_dataloader(config, default_seed=3)
    assert config == CORPUS


def test_every_processor_has_its_seed_key():
    for processor in DATA_PROCESSORS.values():
        assert processor.seed_key in processor.config_class.model_fields


def test_function_from_a_file_beside_the_configuration(tmp_path):
    (tmp_path / "mine.py").write_text("def load(count):\n    return [{'x': i} for i in range(count)]\n")
    loader = build_dataloader({"data_processor": "./mine.py:load", "count": 3}, base_dir=tmp_path)
    assert list(loader) == [{"x": 0}, {"x": 1}, {"x": 2}]


def test_function_that_returns_a_data_loader():
    config = {"data_processor": "torch.utils.data:DataLoader", "dataset": [1, 2, 3, 4], "batch_size": 2}
    assert [batch.tolist() for batch in build_dataloader(config)] == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, "trainer.fit.train_dataloader.data_processor: a dataloader without one is not allowed"),
        ({"data_processor": 3}, "data_processor: 3 is not allowed"),
        ([1], "trainer.fit.train_dataloader: [1] is not allowed; give a map with a data_processor"),
        ({"data_processor": "TextCorpusDataProcesor"}, "did you mean TextCorpusDataProcessor?"),
        ({**CORPUS, "sequence_lenght": 3}, "did you mean sequence_length?"),
        ({**CORPUS, "batch_size": 0}, "trainer.fit.train_dataloader.batch_size: 0 is not allowed"),
        ({**CORPUS, "batch_size": 2.5}, "trainer.fit.train_dataloader.batch_size: 2.5 is not allowed"),
        ({**CORPUS, "split": "test"}, "split: 'test' is not allowed; give train or validation"),
        ({**CORPUS, "num_workers": -1}, "num_workers: -1 is not allowed; give a number of processes"),
        ({**CORPUS, "source": "no/such/*.txt"}, "trainer.fit.train_dataloader.source: 'no/such/*.txt'"),
        ({**CORPUS, "batch_size": 10**9}, "trainer.fit.train_dataloader.batch_size: 1000000000 with"),
        ({"data_processor": "TextCorpusDataProcessor", "batch_size": 4}, "sequence_length: a missing value"),
        ({"data_processor": "no_such:load"}, "trainer.fit.train_dataloader.data_processor: the module"),
        ({"data_processor": "math:pi"}, "math:pi (3.14"),
        ({"data_processor": "math:sqrt"}, "trainer.fit.train_dataloader: math:sqrt with these arguments"),
        ({"data_processor": "os:getpid"}, "os:getpid, which returns"),
    ],
)
def test_errors(config, expected):
    assert expected in message(config)


def test_imports_refused():
    assert "imports are off" in message({"data_processor": "math:sqrt"}, allow_imports=False)


def test_path_is_the_callers():
    assert message({**CORPUS, "batch_size": 0}, path="val[1]").startswith("val[1].batch_size: ")


def test_loading_is_the_same_each_time():
    first, second = (build_dataloader({**CORPUS, "shuffle": True}, default_seed=4) for _ in range(2))
    assert torch.equal(next(iter(first))["input_ids"], next(iter(second))["input_ids"])


@pytest.mark.parametrize("key", ["seed", "shuffle_seed"])
def test_a_broken_seed_of_ones_own_function_is_refused_before_the_first_batch(key):
    config = {"data_processor": "builtins:dict", key: 1.5}
    with pytest.raises(ConfigError, match=rf"data\.{key}: 1\.5 is not allowed; give a whole number"):
        build_dataloader(config, path="data")
