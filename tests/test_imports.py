import subprocess
import sys
from collections import OrderedDict

import pytest

import rarefy
from rarefy.errors import ConfigError
from rarefy.imports import import_object, on_first_use


def test_module_attribute():
    assert import_object("collections:OrderedDict.fromkeys", path="name") == OrderedDict.fromkeys


def test_file_relative_to_base_dir(tmp_path):
    (tmp_path / "mine.py").write_text("class Net:\n    size = 3\n")
    found = import_object("./mine.py:Net", path="name", base_dir=tmp_path)
    assert found.size == 3
    assert import_object("mine.py:Net", path="name", base_dir=tmp_path) is found


def test_files_of_the_same_name_are_told_apart(tmp_path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "same.py").write_text(f"value = {number}\n")
    values = [import_object("same.py:value", path="name", base_dir=tmp_path / name) for name in ("1", "2")]
    assert values == [1, 2]


def test_file_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "here.py").write_text("value = 5\n")
    monkeypatch.chdir(tmp_path)
    assert import_object("./here.py:value", path="name") == 5


@pytest.mark.parametrize("spec", ["collections", ":Net", "collections:", "collections:a-b", "a:b:", "m:x..y"])
def test_malformed(spec):
    with pytest.raises(ConfigError, match=r"^model\.name: .* give package\.module:name or \./file\.py:name"):
        import_object(spec, path="model.name")


def test_imports_refused():
    with pytest.raises(ConfigError, match=r"^name: the import path 'os:path' \(imports are off\)"):
        import_object("os:path", path="name", allow_imports=False)


def test_malformed_is_named_before_refusal():
    with pytest.raises(ConfigError, match="give package"):
        import_object("os", path="name", allow_imports=False)


def test_missing_module():
    with pytest.raises(ConfigError, match=r"the module 'no_such_module' .*No module named 'no_such_module'"):
        import_object("no_such_module:Net", path="name")


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"absent\.py \(there is no such file\)"):
        import_object("./absent.py:Net", path="name", base_dir=tmp_path)


def test_missing_attribute_suggests_near_names():
    with pytest.raises(ConfigError, match=r"there is no OrderdDict in it\).*did you mean OrderedDict\?"):
        import_object("collections:OrderdDict", path="name")


def test_missing_attribute_of_a_large_module_stays_short():
    with pytest.raises(ConfigError) as error:
        import_object("torch:zzzzzzzzzzz", path="name")
    assert len(str(error.value)) < 200


def test_file_that_fails_can_be_mended(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(ConfigError, match="ZeroDivisionError: division by zero") as error:
        import_object("broken.py:value", path="name", base_dir=tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "broken.py").write_text("value = 'mended'\n")
    assert import_object("broken.py:value", path="name", base_dir=tmp_path) == "mended"


def test_a_package_imports_the_home_of_a_name_when_the_name_is_used():
    program = (
        "import sys, rarefy.models as m; before = 'rarefy.models.gpt' in sys.modules; m.GPTModel;"
        "print(before, 'rarefy.models.gpt' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_a_name_that_a_package_does_not_have_is_an_attribute_error_that_lists_those_it_has():
    find = on_first_use({"OrderedDict": "collections"})
    with pytest.raises(AttributeError, match="no 'Counter' here; there are OrderedDict"):
        find("Counter")
    assert not hasattr(rarefy.data, "no_such_name")
