"""Which kernels run: the newest instruction set of this machine, or what RAREFY_KERNELS says."""

from __future__ import annotations

import functools
import importlib
import os
import sys
import warnings
from types import ModuleType

from rarefy.errors import RarefyError
from rarefy.kernels.positional import PositionalExtension

REFERENCE = "reference"
VARIABLE = "RAREFY_KERNELS"


def remedy(platform: str) -> str:
    """What to do without the compiled kernels.

    Args:
        platform: as `sys.platform` names it.

    Example:
        >>> remedy("linux")
        'reinstall rarefy with a C++20 compiler'
    """
    if platform == "darwin":
        return (
            "there are none for macOS, where torch's OpenMP library cannot be shared; leave compute at auto"
        )
    return "reinstall rarefy with a C++20 compiler"


@functools.cache
def extension() -> ModuleType | None:
    """The compiled kernels, or None with one warning where they were not built.

    Example:
        >>> extension() is extension()
        True
    """
    try:
        module = importlib.import_module("rarefy.kernels._C")
        return module if hasattr(module, "Layout") else PositionalExtension(module)
    except ImportError as error:
        warnings.warn(
            f"rarefy runs without its compiled kernels ({error}): compact storage takes the slow plain-torch path; "
            f"{remedy(sys.platform)}, or set {VARIABLE}={REFERENCE} to silence this",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@functools.cache
def _compiled() -> tuple[str, ...]:
    module = extension()
    return tuple(module.instruction_sets()) if module is not None else ()


def available() -> tuple[str, ...]:
    """The names that RAREFY_KERNELS takes on this machine, slowest first.

    Example:
        >>> available()[0]
        'reference'
    """
    return (REFERENCE, *_compiled())


def instruction_set() -> str:
    """The kernels in use: `reference` (plain torch), or `v2`, `v3`, `v4` (x86-64), `base` (other machines).

    Raises:
        RarefyError: RAREFY_KERNELS names something that this machine does not have.

    Example:
        >>> instruction_set() in available()
        True
    """
    return _chosen(os.environ.get(VARIABLE))[0]


def instruction_set_index() -> int | None:
    """The number by which the compiled kernels know the instruction set in use; None for the reference path.

    Example:
        >>> (instruction_set_index() is None) == (instruction_set() == "reference")
        True
    """
    return _chosen(os.environ.get(VARIABLE))[1]


@functools.cache
def _chosen(wanted: str | None) -> tuple[str, int | None]:
    """Name and number of the kernels that a value of RAREFY_KERNELS asks for; every layer asks in every pass."""
    if wanted == REFERENCE:
        return REFERENCE, None
    names = available()
    if wanted is not None and wanted not in names:
        raise RarefyError(
            f"{VARIABLE}: {wanted} is not available here; give one of {', '.join(names)}, or unset it"
        )
    name = wanted or names[-1]
    return name, None if name == REFERENCE else _compiled().index(name)
