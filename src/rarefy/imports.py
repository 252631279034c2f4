"""From `package.module:name` or `./file.py:name` in a configuration to the object it names; packages of extras."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from rarefy.errors import ConfigError, RarefyError, did_you_mean

_FORMS = "package.module:name or ./file.py:name"


def is_import_path(name: str) -> bool:
    """Whether a name in a configuration is an import path and not a registered name.

    Example:
        >>> is_import_path("my_package.models:Net"), is_import_path("gpt2")
        (True, False)
    """
    return ":" in name


def import_object(spec: str, *, path: str, base_dir: Path | None = None, allow_imports: bool = True) -> Any:
    """The object that an import path names. Importing runs the code of that module.

    Args:
        spec: `package.module:name`, or `./file.py:name` with a file relative to `base_dir`; the name may
            have dots.
        path: where the import path stands in the user's file; used in errors.
        base_dir: the directory of that file; None is the working directory.
        allow_imports: False refuses every import.

    Returns:
        The object, whatever its kind.

    Raises:
        ConfigError: imports are refused, the spec has another form, the module cannot be imported, or it has
            no such name.

    Example:
        >>> import_object("collections:OrderedDict", path="trainer.init.model.name")
        <class 'collections.OrderedDict'>
    """
    # From the right: the path of a file may have a colon itself.
    module_name, separator, name = spec.rpartition(":")
    if not separator or not module_name or not all(part.isidentifier() for part in name.split(".")):
        raise ConfigError(path, repr(spec), _FORMS, "torch.nn:Linear")
    if not allow_imports:
        raise ConfigError(path, f"the import path {spec!r} (imports are off)", "a registered name")
    if module_name.endswith(".py"):
        module = _load_file((base_dir or Path()) / module_name, path)
    else:
        module = _load_module(module_name, path)
    return _find(module, name, spec, path)


def _load_module(name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    # Importing runs somebody's code, which may raise anything.
    except Exception as error:
        raise _failed(f"the module {name!r}", error, path) from error


def _load_file(file: Path, path: str) -> ModuleType:
    file = file.resolve()
    if not file.is_file():
        raise ConfigError(path, f"{file} (there is no such file)", _FORMS, "./my_model.py:MyModel")
    # One file is one module, so that a class named twice is the same class; two files of one name are two modules.
    name = f"{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    return sys.modules.get(name) or _execute(file, name, path)


def _execute(file: Path, name: str, path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Before it runs: dataclasses and pickle look a class's module up here.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # Half a module would be found, and taken for the whole, at the next attempt.
        del sys.modules[name]
        raise _failed(str(file), error, path) from error
    return module


def _failed(what: str, error: Exception, path: str) -> ConfigError:
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return ConfigError(path, f"{what} (importing it failed with {reason})", f"an importable {_FORMS}")


def _find(module: ModuleType, name: str, spec: str, path: str) -> Any:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            # A module may define hundreds of names; they are worth a hint only where few or near.
            public = [known for known in dir(found) if not known.startswith("_")]
            near = did_you_mean(part, public)
            hint = (
                f"a name that it defines ({near})"
                if near.startswith(("did", "one of")) and len(near) < 200
                else "a name that it defines"
            )
            raise ConfigError(path, f"{spec!r} (there is no {part} in it)", hint)
        found = getattr(found, part)
    return found


def on_first_use(homes: Mapping[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package that imports a public name's home when the name is first used.

    Who needs one part of a package then pays for that part alone.

    Args:
        homes: name → module that defines it.

    Returns:
        What to call `__getattr__` in the package's `__init__.py`.

    Raises:
        AttributeError: by what is returned, for a name that is not among them.

    Example:
        >>> find = on_first_use({"OrderedDict": "collections"})
        >>> find("OrderedDict")
        <class 'collections.OrderedDict'>
    """

    def find(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"no {name!r} here; there are {', '.join(sorted(homes))}")
        return getattr(importlib.import_module(homes[name]), name)

    return find


def require(extra: str, *modules: str) -> Any:
    """The first of `modules` that can be imported; those in use already come first.

    Args:
        extra: the extra of rarefy that brings one of them.
        *modules: names in order of preference.

    Raises:
        RarefyError: none can be imported.

    Example:
        >>> require("transformers", "no_such_package", "json").__name__
        'json'
    """
    reasons = []
    # Of two packages with the same classes the program's own is meant; those of the other would fail isinstance.
    for name in sorted(modules, key=lambda name: name not in sys.modules):
        try:
            return importlib.import_module(name)
        except ImportError as error:
            reasons.append(str(error))
    raise RarefyError(f"{'; '.join(reasons)}: pip install 'rarefy[{extra}]'")
