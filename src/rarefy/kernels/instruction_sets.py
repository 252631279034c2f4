"""Which kernels run: the newest instruction set of this machine and its matrix unit, or what RAREFY_KERNELS says."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import sys
import warnings
from types import ModuleType
from typing import NamedTuple

from rarefy.errors import RarefyError

REFERENCE = "reference"
TRITON = "triton"
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
        # After torch, which this package imports first: the kernels then share its OpenMP threads.
        return importlib.import_module("rarefy.kernels._C")
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
    """The instruction sets of this machine, slowest first: names that RAREFY_KERNELS takes.

    Example:
        >>> available()[0]
        'reference'
    """
    return (REFERENCE, *_compiled())


@functools.cache
def matrix_units() -> tuple[str, ...]:
    """What this machine multiplies pairs of bfloat16 with, in layers of blocks: names that RAREFY_KERNELS takes too.

    `v4_bf16` are the instructions of avx512_bf16, `v4_amx` is the matrix unit of some processors; what they do not take
    goes to `v4`.

    Example:
        >>> set(matrix_units()) <= {"v4_bf16", "v4_amx"}
        True
    """
    module = extension()
    return tuple(module.matrix_units()) if module is not None else ()


def instruction_set() -> str:
    """The kernels in use: `reference` (plain torch), or `v2`, `v3`, `v4` (x86-64), `base` (other machines).

    Raises:
        RarefyError: RAREFY_KERNELS names something that this machine does not have.

    Example:
        >>> instruction_set() in available()
        True
    """
    return _chosen(os.environ.get(VARIABLE)).name


def instruction_set_index() -> int | None:
    """The number by which the compiled kernels know the instruction set in use; None for the reference path.

    Example:
        >>> (instruction_set_index() is None) == (instruction_set() == "reference")
        True
    """
    return _chosen(os.environ.get(VARIABLE)).number


def on_intel() -> bool:
    """Whether choices hold that were measured on Intel's processors with AVX-512, whose instructions are in use.

    Example:
        >>> on_intel() in (True, False)
        True
    """
    # Asked in this order: the reference path has no use for the kernels, nor for a warning that there are none.
    return instruction_set() == "v4" and getattr(extension(), "is_intel", bool)()


def matrix_unit() -> str:
    """What multiplies pairs of bfloat16 in layers of blocks; empty where float32 vectors do, because they are faster.

    Example:
        >>> matrix_unit() in ("", *matrix_units())
        True
    """
    return _chosen(os.environ.get(VARIABLE)).unit


def half_obstacle() -> str:
    """Why the kernels in use have no tiles in float16; empty where they have.

    Raises:
        RarefyError: RAREFY_KERNELS names something that this machine does not have.

    Example:
        >>> (half_obstacle() == "") == takes_half()
        True
    """
    wanted = os.environ.get(VARIABLE)
    module = extension()
    if takes_half():
        return ""
    if module is None:
        return f"the compiled kernels are not installed; {remedy(sys.platform)}"
    if not hasattr(module, "half_obstacle"):
        return "the compiled kernels are older than rarefy; install it again"
    return module.half_obstacle() or f"{VARIABLE}={wanted} takes others"


def takes_half() -> bool:
    """Whether the kernels in use have tiles in float16: with avx512_fp16, unless RAREFY_KERNELS forces others.

    Example:
        >>> takes_half() in (True, False)
        True
    """
    return _chosen(os.environ.get(VARIABLE)).has_half


def takes_triton(is_on_gpu: bool) -> bool:
    """Whether layers of blocks take Triton's kernels where those run.

    On a GPU always, but for `RAREFY_KERNELS=reference`. On the CPU, in its interpreter, with `RAREFY_KERNELS=triton`
    only: that is slow, and made for tests.

    Args:
        is_on_gpu: where the layer is.

    Raises:
        RarefyError: RAREFY_KERNELS names something that this machine does not have.

    Example:
        >>> takes_triton(is_on_gpu=False)
        False
    """
    wanted = os.environ.get(VARIABLE)
    return wanted != REFERENCE if is_on_gpu else _chosen(wanted).unit == TRITON


@functools.cache
def has_triton() -> bool:
    """Whether Triton is installed, without importing it.

    Example:
        >>> has_triton() is has_triton()
        True
    """
    return importlib.util.find_spec(TRITON) is not None


class _Choice(NamedTuple):
    name: str
    number: int | None
    unit: str
    has_half: bool = False


# By its value, since the variable may be set or changed after the import.
@functools.cache
def _chosen(wanted: str | None) -> _Choice:
    """The kernels that a value of RAREFY_KERNELS asks for; every layer asks in every pass."""
    if wanted == REFERENCE:
        return _Choice(REFERENCE, None, "")
    if wanted == TRITON:
        _check_interpreter()
        return _Choice(REFERENCE, None, TRITON)
    names = available()
    if wanted is not None and wanted not in (*names, *matrix_units()):
        allowed = ", ".join((*names, *matrix_units()))
        raise RarefyError(f"{VARIABLE}: {wanted} is not available here; give one of {allowed}, or unset it")
    if wanted in names:
        return _Choice(wanted, _compiled().index(wanted), "")
    name = names[-1]
    if name == REFERENCE:
        return _Choice(REFERENCE, None, "")
    unit = _best_unit() if wanted is None else wanted
    return _Choice(name, _compiled().index(name), unit, _has_half())


def _has_half() -> bool:
    """Whether processor and build have tiles in float16."""
    obstacle = getattr(extension(), "half_obstacle", None)
    return obstacle is not None and not obstacle()


def _best_unit() -> str:
    """The fastest of `matrix_units`, or nothing where float32 vectors are faster."""
    module = extension()
    return module.best_matrix_unit() if module is not None and matrix_units() else ""


def _check_interpreter() -> None:
    """Refuses to take Triton's kernels on the CPU where nothing interprets them."""
    if os.environ.get("TRITON_INTERPRET") == "1" and has_triton():
        return
    raise RarefyError(
        f"{VARIABLE}: {TRITON} is for tests on the CPU and needs TRITON_INTERPRET=1 and an installed triton; unset it: "
        "on a GPU layers of blocks take Triton's kernels by themselves"
    )
