"""A model that does not fit into memory: planned on the meta device, where weights have shapes and no numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from rarefy import filters
from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.callbacks.flops import ForwardFlops
from rarefy.cost.free_memory import available_bytes
from rarefy.errors import ConfigError
from rarefy.models.call import ModelCall, loss_of, to_device
from rarefy.models.registry import MODELS
from rarefy.patterns import Pattern
from rarefy.run.builder import Builder

_GIB = 2**30


@dataclass(frozen=True)
class LargeModel:
    """A decoder without weights, and why it has none.

    Args:
        model: on the meta device.
        weight_bytes: what its weights would take.
        free_bytes: what is free.
        copies: how many times the weights have to fit.
    """

    model: nn.Module
    weight_bytes: int
    free_bytes: int
    copies: int = 1

    def __str__(self) -> str:
        what = "for its weights alone" if self.copies == 1 else "for its weights, gradients and masks"
        needed = f"{self.copies * self.weight_bytes / _GIB:,.1f} GiB {what}"
        return f"the model needs {needed}, and {self.free_bytes / _GIB:,.1f} GiB is free"


def too_large(builder: Builder, available: int | None = None, copies: int = 1) -> LargeModel | None:
    """The model of a run without its weights where these would not fit; None where they do, or nobody can tell.

    Args:
        builder: of the run.
        available: free bytes; None looks at the device of the run.
        copies: how many times the weights have to fit: once to be built, more often for a step.

    Raises:
        ConfigError: as for `Builder.model`.
    """
    # Other models may need their numbers while they are built.
    if builder.config.init.model.name.lower() not in MODELS:
        return None
    free = available_bytes(builder.device) if available is None else available
    if free is None:
        return None
    # Shapes without numbers: what does not fit is not even asked for.
    with torch.device("meta"):
        model = builder.model(starts=False)
    needed = sum(one.numel() * one.element_size() for one in model.parameters())
    return LargeModel(model, needed, free, copies) if copies * needed > free else None


def refuse_too_large(builder: Builder) -> None:
    """Refuses a model that could not even be built.

    Raises:
        ConfigError: with what it needs and what there is.
    """
    found = too_large(builder)
    if found is not None:
        given = f"a run on this machine ({found})"
        raise ConfigError(
            f"{builder.path}.model", given, "a smaller model, or more memory; --validate_only plans it"
        )


def shared_out(
    model: nn.Module, algorithms: Iterable[SparsityAlgorithm]
) -> Iterator[tuple[SparsityAlgorithm, dict[str, tuple[filters.Candidate, Pattern]]]]:
    """Which weights each algorithm would take, the first that matches one, with the pattern of its masks.

    Raises:
        ConfigError: an algorithm that gets nothing, or a pattern that does not divide a weight.
    """
    taken: set[str] = set()
    for algorithm in algorithms:
        chosen: dict[str, tuple[filters.Candidate, Pattern]] = {}
        for candidate in filters.candidates(model):
            if candidate.name in taken or not filters.decide(candidate, algorithm.globs).sparse:
                continue
            pattern = algorithm.pattern.on(candidate.axes)
            pattern.check(candidate.name, candidate.shape)
            chosen[candidate.name] = candidate, pattern
        if not chosen:
            globs = ", ".join(algorithm.globs or ("the default filter",))
            raise ConfigError(
                "param_filter", f"{globs} (nothing is left for it)", "a filter that matches a weight"
            )
        taken |= chosen.keys()
        yield algorithm, chosen


def flops_of(model: nn.Module, batch: Any) -> tuple[dict[str, int], int]:
    """Floating-point operations of a step on a batch, without taking it: three times those of the forward pass.

    Args:
        model: on the meta device.
        batch: as its data gives it.

    Returns:
        Those with each weight by its name, and those of the whole step.
    """
    call = ModelCall(model)
    call.check(batch)
    model.train()
    with ForwardFlops(model) as counted, torch.no_grad():
        loss_of(call(to_device(batch, torch.device("meta"))))
    whole = sum(counted.by_parameter.values()) + counted.other
    return {name: 3 * number for name, number in counted.by_parameter.items()}, 3 * whole
