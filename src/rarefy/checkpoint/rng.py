"""The state of every global random generator, as tensors."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

CUDA_PREFIX = "cuda."


def capture() -> dict[str, Tensor]:
    """The states of Python's, NumPy's and torch's generators, those of the GPUs included.

    Returns:
        Tensors by name; `restore` takes them back.

    Example:
        >>> states = capture(); first = torch.rand(1); restore(states); bool(first == torch.rand(1))
        True
    """
    states = {**_capture_python(), **_capture_numpy(), "torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"{CUDA_PREFIX}{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore(states: Mapping[str, Tensor]) -> None:
    """Sets the generators to what `capture` found; one that was not captured or is gone is left alone.

    Args:
        states: the result of `capture`.
    """
    if "python.words" in states:
        _restore_python(states)
    if "numpy.words" in states:
        _restore_numpy(states)
    if "torch" in states:
        torch.set_rng_state(states["torch"])
    for index in range(torch.cuda.device_count()):
        if f"{CUDA_PREFIX}{index}" in states:
            torch.cuda.set_rng_state(states[f"{CUDA_PREFIX}{index}"], index)


def _capture_python() -> dict[str, Tensor]:
    _, words, gauss = random.getstate()
    spare = [] if gauss is None else [gauss]
    # float32, torch's default, would round the spare number, and the next draw would differ.
    return {"python.words": torch.tensor(words), "python.gauss": torch.tensor(spare, dtype=torch.float64)}


def _restore_python(states: Mapping[str, Tensor]) -> None:
    version = random.getstate()[0]
    spare = states["python.gauss"].tolist()
    random.setstate((version, tuple(states["python.words"].tolist()), spare[0] if spare else None))


def _capture_numpy() -> dict[str, Tensor]:
    state: Any = np.random.get_state(legacy=False)
    words = [*state["state"]["key"].tolist(), state["state"]["pos"], state["has_gauss"]]
    gauss = torch.tensor([state["gauss"]], dtype=torch.float64)
    return {"numpy.words": torch.tensor(words), "numpy.gauss": gauss}


def _restore_numpy(states: Mapping[str, Tensor]) -> None:
    *key, position, has_gauss = states["numpy.words"].tolist()
    gauss = states["numpy.gauss"].item()
    # NumPy's global generator is this one, unless somebody has replaced it.
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position, has_gauss, gauss))
