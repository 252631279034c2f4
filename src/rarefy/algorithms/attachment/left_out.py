"""What a model tells `DistributedDataParallel` to leave alone: sparse weights, whose gradients are averaged here."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from rarefy.errors import RarefyError
from rarefy.nn import CopiedMask
from rarefy.torch_private import COMPILED_PREFIX
from rarefy.torch_private.ddp import LEFT_OUT, ddp_in_forward


class Source(Protocol):
    """Who averages weights by itself."""

    def leaves(self, model: nn.Module) -> Mapping[str, str]:
        """The names of weights and masks in a model, and whose they are."""
        ...

    def left(self, model: nn.Module, owners: Iterable[str]) -> None:
        """Called when a wrapper of a model is built that leaves these weights alone."""
        ...


class LeftOut:
    """The names of a model's sparse weights and masks, as they are when a wrapper asks for them.

    Where nothing else of the model learns, it is empty: torch refuses to wrap a model without a parameter of its own.
    A copy of the model has only the names that others gave, since nobody averages its weights.

    Args:
        model: in which names are looked for.
        others: names that were there before.
    """

    def __init__(self, model: nn.Module, others: Iterable[str]) -> None:
        self.others = list(others)
        self.sources: list[Source] = []
        self._model = weakref.ref(model)

    def __iter__(self) -> Iterator[str]:
        model = self._model()
        if model is None:
            return iter(self.others)
        found = {source: source.leaves(model) for source in self.sources}
        names = {*self.others}.union(*found.values())
        learning = {name for name, weight in model.named_parameters() if weight.requires_grad}
        if learning <= names:
            return iter(self.others)
        for source, leaves in found.items():
            source.left(model, set(leaves.values()))
        # The reducer puts a dot before names of the wrapped module itself, and a compiled model has a prefix.
        names |= {f".{name}" for name in names if "." not in name}
        return iter(names | {COMPILED_PREFIX + name for name in names})

    def __deepcopy__(self, memo: dict[int, Any]) -> list[str]:
        return list(self.others)

    def __reduce__(self) -> Any:
        return list, (list(self.others),)


def leave_out(model: nn.Module, source: Source) -> None:
    """Lets wrappers of a model that are built from now on leave the weights of a source alone."""
    present = getattr(model, LEFT_OUT, ())
    if not isinstance(present, LeftOut):
        present = LeftOut(model, present)
        setattr(model, LEFT_OUT, present)
    if source not in present.sources:
        present.sources.append(source)


def take_back(model: nn.Module) -> None:
    """Leaves no trace of `leave_out` in a model."""
    for module in model.modules():
        present = vars(module).get(LEFT_OUT)
        if isinstance(present, LeftOut):
            delattr(module, LEFT_OUT)
            if present.others:
                setattr(module, LEFT_OUT, present.others)


OF_A_COPY = (
    "a copy of a DistributedDataParallel model does not average its sparse weights; copy the model inside "
    "(ddp.module), call sparsity.apply on that copy, and build DistributedDataParallel of it"
)


def refuse_copied_wrapper(model: nn.Module) -> None:
    """Refuses the forward pass of a wrapper that was copied before its first one, so that no hook of it tells.

    Args:
        model: a copy without an algorithm, whose forward pass begins.

    Raises:
        RarefyError: its wrapper leaves weights alone that were sparse where it was copied from.
    """
    ddp = ddp_in_forward()
    if ddp is None or not torch.is_grad_enabled():
        return
    # Masks that are an algorithm's again, or plain buffers by now, are no such.
    copied = (name for name, buffer in model.named_buffers() if isinstance(buffer, CopiedMask))
    if any(name in ddp.parameters_to_ignore for name in copied):
        raise RarefyError(OF_A_COPY)
