"""From lists of names to callbacks and loggers."""

import logging
from pathlib import Path

import pytest
from rich.console import Console

from rarefy.callbacks import Callback, ComputeNorm, CSVLogger, Logger, LogSparsity, ProgressLogger
from rarefy.callbacks.ignored import IGNORED
from rarefy.callbacks.registry import DEFAULTS, REGISTRY, Kind, build_callbacks
from rarefy.errors import ConfigError

USER_FILE = """
from rarefy.errors import ConfigError
from rarefy.callbacks import Callback, Logger

class Mine(Callback):
    def __init__(self, size=1):
        if size == 7:
            raise ConfigError("size", size, "any other number")
        if size < 0:
            raise ValueError("too small")
        self.size = size

class MyLogger(Logger):
    pass

NOT_A_CLASS = 3

def make():
    return "text"
"""


def build(entries, defaults=(), kind: Kind = "callbacks", **options) -> list[Callback]:
    return build_callbacks(entries, defaults, path=f"trainer.init.{kind}", kind=kind, **options)


def kinds(built: list[Callback]) -> list[str]:
    return [type(one).__name__ for one in built]


@pytest.fixture
def user_dir(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(USER_FILE)
    return tmp_path


@pytest.mark.parametrize("kind", ["callbacks", "loggers"])
def test_every_registered_name_builds_its_class(kind):
    usable = {name: one for name, one in REGISTRY[kind].items() if one.is_usable}
    assert len(usable) > 2
    for name, registered in usable.items():
        assert kinds(build([{name: {}}], kind=kind)) == [name] == [registered.kind.__name__]


@pytest.mark.parametrize("kind", ["callbacks", "loggers"])
def test_the_defaults_exist(kind):
    assert kinds(build([], DEFAULTS[kind], kind)) == list(DEFAULTS[kind])


@pytest.mark.parametrize("name", ["logsparsity", "LOGSPARSITY", "LogSparsity"])
def test_case_does_not_matter(name):
    assert kinds(build([{name: {}}])) == ["LogSparsity"]


def test_the_defaults_come_first_and_null_removes_one():
    assert kinds(build([{"LogSparsity": {}}], ["ComputeNorm"])) == ["ComputeNorm", "LogSparsity"]
    assert kinds(build([{"computenorm": None}, {"LogSparsity": {}}], ["ComputeNorm"])) == ["LogSparsity"]
    assert build([{"LogSparsity": None}]) == []


def test_an_entry_replaces_the_default_of_its_name():
    [logger] = build([{"TensorBoardLogger": {"summary_dir": "tb"}}], ["TensorBoardLogger"], "loggers")
    assert vars(logger)["summary_dir"] == "tb"
    own = ProgressLogger(Console())
    assert build([own], ["ProgressLogger", "CSVLogger"], "loggers")[0] is own


def test_ready_made_objects_are_taken_as_they_are():
    class Own(Callback):
        pass

    first, second = Own(), Own()
    assert build([first, {"LogSparsity": {}}, second])[::2] == [first, second]


def test_import_paths(user_dir):
    entries = [{"./mine.py:Mine": {"size": 5}}, {"./mine.py:Mine": {}}]
    assert [vars(one)["size"] for one in build(entries, base_dir=user_dir)] == [5, 1]
    assert kinds(build([{"rarefy.callbacks:CSVLogger": {}}], kind="loggers")) == ["CSVLogger"]
    assert build([{"./mine.py:Mine": None}], base_dir=user_dir) == []


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"LogSparsty": {}}, r"callbacks\[0\]: 'LogSparsty' is not allowed; .*did you mean LogSparsity\?"),
        (
            {"zzz": {}},
            r"one of ComputeNorm, LoadCheckpointStates, LogSparsity, RunRecord\) or an import path",
        ),
        ({"CSVLogger": {}}, r"'CSVLogger' among the callbacks is not allowed; give it under loggers"),
        ({"LogSparsity": {"every": 3}}, r"callbacks\[0\]\.LogSparsity: the key 'every' .* no options"),
        ({"LogSparsity": 3}, r"callbacks\[0\]: .*a map of one name to its options"),
        ({"A": {}, "B": {}}, "a map of one name to its options"),
        ({}, "a map of one name to its options"),
        ("LogSparsity", r"example: LogSparsity: \{\}"),
        ({3: {}}, "a map of one name to its options"),
        (CSVLogger(), "the logger CSVLogger among the callbacks is not allowed; give it under loggers"),
        ({"./mine.py:Mine": {"sise": 1}}, r"other options \(got an unexpected keyword .*'sise'\)"),
        ({"./mine.py:Mine": {"size": -1}}, r"other options \(too small\)"),
        ({"./mine.py:Mine": {"size": 7}}, r"callbacks\[0\]\.\./mine\.py:Mine\.size: 7 is not allowed"),
        ({"./mine.py:NOT_A_CLASS": {}}, "3 is not allowed; give a class"),
        ({"./mine.py:make": {}}, r"a str is not allowed; give a subclass of rarefy\.callbacks\.Callback"),
        ({"./mine.py:MyLogger": {}}, "the logger MyLogger among the callbacks"),
        ({"./mine.py:Gone": {}}, "Gone"),
    ],
)
def test_errors_name_the_place_and_the_fix(user_dir, entry, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build([entry], base_dir=user_dir)
    assert str(caught.value).startswith("trainer.init.callbacks")


def test_errors_among_the_loggers():
    with pytest.raises(
        ConfigError, match=r"loggers\[0\]: 'ComputeNorm' among the loggers .* under callbacks"
    ):
        build([{"ComputeNorm": {}}], kind="loggers")
    with pytest.raises(ConfigError, match=r"a ComputeNorm is not allowed; give a subclass of .*Logger"):
        build([ComputeNorm()], kind="loggers")
    with pytest.raises(ConfigError, match=r"the key 'dir' is not allowed; give one of summary_dir"):
        build([{"TensorBoardLogger": {"dir": "x"}}], kind="loggers")


def test_imports_can_be_refused(user_dir):
    with pytest.raises(ConfigError):
        build([{"./mine.py:Mine": {}}], base_dir=user_dir, allow_imports=False)


def test_model_zoo_names_are_left_out_with_one_note(caplog):
    entries = [{"GlobalFlags": {"csx.x": 1}}, {"LogSparsity": {}}, {"KeepNCheckpoints": {"n": 3}}]
    with caplog.at_level(logging.WARNING):
        assert kinds(build(entries)) == ["LogSparsity"]
    [note] = [record.getMessage() for record in caplog.records]
    expected = "GlobalFlags, KeepNCheckpoints (instead: checkpoint.keep_last)"
    assert note == f"trainer.init.callbacks: ignored, no use for {expected}"


def test_what_rarefy_has_is_not_ignored():
    assert not set(IGNORED) & {name for kind in REGISTRY.values() for name in kind}


def test_the_bases_and_classes_are_public():
    assert issubclass(Logger, Callback) and issubclass(LogSparsity, Callback)


@pytest.mark.parametrize(("name", "package"), [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_logger_whose_package_is_absent_says_how_to_get_it(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(ConfigError, match=rf"loggers\[0\]\.{name}: .*pip install 'rarefy\[{package}\]'"):
        build([{name: {}}], kind="loggers")
