"""The `compute` option: which storage a weight gets, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rarefy.cost.rule import MARGIN
from rarefy.cost.timed import Layer, time_layers, timed
from rarefy.distributed import is_cut, is_first, of_first
from rarefy.errors import ConfigError
from rarefy.filters import Candidate, Place
from rarefy.kernels import gpu, half_obstacle, instruction_set, takes_blocks
from rarefy.nn import SparseLinear, is_conv1d
from rarefy.storage.compact import CompactStorage
from rarefy.storage.optimizer_traits import is_element_wise, trained_parameters
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.protocol import Kind

HALF = "half"  # the option `compute: {compact: half}`, checked
COMPACT = frozenset({"compact", HALF})
_KINDS: tuple[Kind, ...] = ("masked", "compact")
# Of a modest batch; after the first step the number is known, and `auto` decides again.
ASSUMED_TOKENS = 512
TIMED_AT = 20  # the step after which the rule's choices are checked by timing, once


def obstacle(places: Sequence[Place], block: tuple[int, int] | None = None) -> str:
    """Why a weight cannot have compact storage; empty if it can.

    Args:
        places: the module attributes that hold it.
        block: outputs and inputs of the blocks in which its masks come, where kernels for a GPU may be taken, whose
            speed nobody measured yet; None where storage has to pay.

    Example:
        >>> obstacle([Place(nn.Linear(2, 2), "weight")]), obstacle([Place(nn.Conv2d(2, 2, 2), "weight")])
        ('', 'its module is a Conv2d, not an nn.Linear itself')
    """
    module = places[0].module
    leaf = places[0].leaf
    if is_cut(getattr(module, leaf)):
        return "fully_shard cuts it in pieces"
    if len(places) > 1:
        return "it is tied"
    if leaf != "weight":
        return f"it is the {leaf} of its module"
    # The very class: a subclass may do something else with its weight.
    if not (type(module) is nn.Linear or isinstance(module, SparseLinear) or is_conv1d(module)):
        return f"its module is a {type(module).__name__}, not an nn.Linear itself"
    return _obstacle_on(next(module.parameters(recurse=False)).device, block)


def _obstacle_on(device: torch.device, block: tuple[int, int] | None) -> str:
    if device.type == "cpu":
        return ""
    if device.type != "cuda" or block is None:
        return f"it is on {device}"
    if not takes_blocks(block):
        return f"it is on {device}, whose kernels take blocks with sides that are multiples of 8"
    found = gpu.obstacle(device)
    return f"it is on {device}, and {found}" if found else ""


def check_compact(candidate: Candidate, block: tuple[int, int] | None = None, *, half: bool = False) -> None:
    """Refuses `compute: compact` for a weight that cannot have it.

    Args:
        candidate: the weight.
        block: outputs and inputs of the blocks in which its masks come; None for single connections.
        half: whether it is `{compact: half}`.

    Raises:
        ConfigError: the weight is not that of a plain linear layer on the CPU, or of blocks on a GPU, or there is
            nothing to multiply it with in half precision.
    """
    if half:
        _check_half(candidate, block)
    found = obstacle(candidate.places, block)
    if found:
        problem = f"compact for {candidate.name} ({found})"
        raise ConfigError(
            "compute", problem, "auto, which takes compact storage where it can", "compute: auto"
        )


def _check_half(candidate: Candidate, block: tuple[int, int] | None) -> None:
    found = half_obstacle()
    if not found and block is not None and takes_blocks(block):
        found = f"its blocks of {block[0]} × {block[1]} are multiplied in bfloat16 under autocast already"
    if not found and candidate.parameter.dtype != torch.float32:
        found = f"it is {candidate.parameter.dtype}; under autocast weights are float32"
    if found:
        problem = f"half for {candidate.name} ({found})"
        raise ConfigError("compute.compact", problem, "compute: compact or auto", "compute: compact")


def wanted_storage(parameter: SparseParameter, compute: str, optimizers: Sequence[Optimizer]) -> Kind:
    """The storage that the option asks for.

    `auto` is compact where the cost rule expects a gain of 3% or more: float32 weights of plain linear layers on the
    CPU, trained by an element-wise optimizer. Before the first step 512 tokens are assumed.

    Args:
        parameter: the weight, with its present mask.
        compute: `auto`, `masked`, `compact` or `half`.
        optimizers: those that the algorithm follows.

    Example:
        >>> from rarefy.filters import candidates
        >>> from rarefy.patterns import Pattern
        >>> weight = next(iter(candidates(nn.Linear(4, 4))))
        >>> wanted_storage(SparseParameter(weight, Pattern()), "auto", [])
        'masked'
    """
    if compute != "auto":
        return "compact" if compute in COMPACT else "masked"
    if not _may_choose(parameter, optimizers):
        return "masked"
    layer = _layer(parameter)
    relative = timed(layer)
    # A layer that was timed is known; the rule is asked for the others.
    pays = layer.is_expected_to_pay() if relative is None else relative * MARGIN < 1
    return "compact" if pays else "masked"


def _may_choose(parameter: SparseParameter, optimizers: Sequence[Optimizer]) -> bool:
    """Whether a weight can have either storage."""
    own = [optimizer for optimizer in optimizers if parameter.weight in trained_parameters(optimizer)]
    is_plain = parameter.weight.dtype == torch.float32 and not obstacle(parameter.places)
    # Any other optimizer may need the weight as a matrix, which a compact one would build at each step.
    return bool(own) and is_plain and all(map(is_element_wise, own))


def time_doubtful(
    parameters: Mapping[str, SparseParameter], optimizers: Sequence[Optimizer], step: int
) -> None:
    """Times the layers whose choice by the rule may be wrong, each kind once on a machine.

    A rule that does not know the machine is helped out at once, one that does is checked after `TIMED_AT` steps.

    Args:
        parameters: weights with `compute: auto`.
        optimizers: those that the algorithm follows.
        step: optimizer steps taken.
    """
    # The others take what the first process has found.
    if not is_first():
        return
    may = [one for one in parameters.values() if one.tokens is not None and _may_choose(one, optimizers)]
    layers = map(_layer, may)
    time_layers(layer for layer in layers if layer.is_doubtful(has_run=step == TIMED_AT))


def _layer(parameter: SparseParameter) -> Layer:
    """What the rule is asked about."""
    rows, columns = parameter.shape
    tokens = ASSUMED_TOKENS if parameter.tokens is None else parameter.tokens
    density = 1 - parameter.actual_sparsity
    return Layer(rows, columns, tokens, density, parameter.dtype, parameter.pattern.block)


def choose_storage(
    parameters: Mapping[str, SparseParameter],
    compute: str,
    optimizers: Sequence[Optimizer],
    step: int | None = None,
) -> None:
    """Gives every weight the storage that the option asks for at its present sparsity.

    What `auto` chooses depends on the machine and on the batch: of several processes the first one says it for all.

    Args:
        parameters: the weights.
        compute: `auto`, `masked`, `compact` or `half`.
        optimizers: those that the algorithm follows.
        step: the number of the step that is just over; what the rule is not sure of is then timed.
    """
    if compute == "auto" and step is not None:
        time_doubtful(parameters, optimizers, step)
    kinds: list[Kind] = [wanted_storage(parameter, compute, optimizers) for parameter in parameters.values()]
    if compute == "auto" and parameters:
        device = next(iter(parameters.values())).weight.device
        # As numbers, which is what processes exchange.
        places = of_first([_KINDS.index(kind) for kind in kinds], device)
        kinds = [_KINDS[place] for place in places]
    for parameter, kind in zip(parameters.values(), kinds, strict=True):
        parameter.become(kind, optimizers)
        if compute == HALF and isinstance(parameter.storage, CompactStorage):
            parameter.storage.take_half()


def storage_state(parameters: Mapping[str, SparseParameter]) -> dict[str, Any]:
    """The choices and what they rest on, to be saved."""
    kinds = {name: parameter.storage.kind for name, parameter in parameters.items()}
    seen = {
        name: {"tokens": parameter.tokens, "dtype": str(parameter.dtype).removeprefix("torch.")}
        for name, parameter in parameters.items()
        if parameter.tokens is not None
    }
    return {"storage": kinds, "activations": seen, "instruction_set": instruction_set()}


def restore_storage(
    parameters: Mapping[str, SparseParameter], state: Mapping[str, Any], optimizers: Sequence[Optimizer]
) -> None:
    """Takes up the choices of `auto` that were saved with these kernels, so that a run goes on bit for bit."""
    for name, seen in state.get("activations", {}).items():
        if name in parameters:
            parameters[name].tokens = seen["tokens"]
            parameters[name].dtype = getattr(torch, seen["dtype"])
    # Other kernels round in another way, so there is nothing to keep; `auto` decides by what pays here.
    if state.get("instruction_set") != instruction_set():
        return
    for name, kind in state["storage"].items():
        if name in parameters and not obstacle(parameters[name].places):
            parameters[name].become(kind, optimizers)
