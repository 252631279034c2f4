"""What an algorithm is shown of one weight: on update steps all of it, before optimizer steps what exists of it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.initializers import left_alone

Needs = Literal["none", "active", "dense"]
NEEDS: tuple[Needs, ...] = ("none", "active", "dense")
UpdateMask = Callable[..., Tensor]
_Method = TypeVar("_Method", bound=UpdateMask)
_FORMS: Mapping[int, str] = {1: "view", 3: "weight, mask, sparsity", 4: "weight, mask, sparsity, dense_grad"}


class Numbers(Mapping[str, Tensor]):
    """An algorithm's numbers of a weight by name, to be written in place or by assignment.

    Args:
        tensors: those that are kept; an assignment is copied into them, as another tensor would be lost.

    Example:
        >>> numbers = Numbers({"score": torch.zeros(2)})
        >>> numbers["score"] = torch.tensor([1.0, 2.0])
        >>> numbers["score"]
        tensor([1., 2.])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __setitem__(self, name: str, numbers: Tensor) -> None:
        """Overwrites what is kept.

        Raises:
            RarefyError: nothing of that name is kept.
        """
        if name not in self._tensors:
            known = ", ".join(self._tensors) or "none"
            raise RarefyError(
                f"view.state[{name!r}]: the algorithm keeps no such numbers ({known}); declare them: "
                f'connection_state = {{"{name}": 0.0}}'
            )
        self._tensors[name].copy_(numbers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class WeightView:
    """One weight on an update step, or one of its balanced groups; every tensor has the shape of `weight`.

    Args:
        name: of the parameter, as in `model.named_parameters()`.
        weight: dense, with exact zeros. Not to be changed.
        mask: bool, True = active. Not to be changed.
        sparsity: target for this weight, in [0, 1].
        step: the optimizer step after which the topology is updated.
        generator: a CPU generator, fresh for every parameter and update; the source of all randomness.
        gradient: what the algorithm asked for by `needs`: None, the gradient of active connections with zeros
            elsewhere, or the mean gradient at every position.
        state: the algorithm's `connection_state` by name, a new connection's number at inactive positions. What is
            written or assigned to it stays.

    Example:
        >>> view = WeightView.of(torch.ones(2), torch.tensor([True, False]), 0.5)
        >>> view.mask.tolist(), view.gradient, dict(view.state)
        ([True, False], None, {})
    """

    name: str
    weight: Tensor
    mask: Tensor
    sparsity: float
    step: int
    generator: torch.Generator
    gradient: Tensor | None
    state: Numbers

    def left_alone(self, source: str) -> AbstractContextManager[None]:
        """Refuses what is written in place to weight, mask or gradient while `source` is called."""
        shown = {"weight": self.weight, "mask": self.mask, "gradient": self.gradient}
        return left_alone(source, self.name, **shown)

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, sparsity: float, gradient: Tensor | None = None) -> WeightView:
        """A view of four tensors that somebody has in hand, outside of an update."""
        return cls("", weight, mask, sparsity, 0, torch.Generator(), gradient, Numbers({}))


@dataclass(frozen=True)
class StepView:
    """What exists of one weight just before an optimizer step: one entry a connection.

    Every tensor has the same shape: that of the weight in masked storage, with zeros at inactive positions, and one row
    of values in compact storage. Code that treats entries one by one is therefore right in both.

    Args:
        name: of the parameter.
        weight: what the step is about to change. Not to be changed.
        gradient: that the optimizer is about to use, without the factor of a gradient scaler. Not to be changed.
        state: the algorithm's `connection_state` by name, to be written in place or by assignment.
        step: number of the optimizer step that comes.
    """

    name: str
    weight: Tensor
    gradient: Tensor
    state: Numbers
    step: int


def declared_needs(kind: type) -> Needs:
    """The gradient that a class of algorithms asks for.

    Raises:
        RarefyError: none that there is.
    """
    own = vars(kind)
    # `needs_dense_grad = True` is how a class says `needs = "dense"` since before there was `active`.
    if "needs" not in own and "needs_dense_grad" in own:
        return "dense" if own["needs_dense_grad"] else "none"
    needs = getattr(kind, "needs", "none")
    if needs not in NEEDS:
        raise RarefyError(f"{kind.__name__}.needs: {needs!r} is not allowed; give one of {', '.join(NEEDS)}")
    return needs


def refuse_abstract(kind: type) -> None:
    """Refuses a class of algorithms that lacks the method which makes the masks.

    Raises:
        RarefyError: it does.
    """
    if inspect.isabstract(kind):
        missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
        raise RarefyError(
            f"{kind.__name__} cannot make masks: it lacks {missing}; write it, or subclass an algorithm that has it"
        )


def is_replaced(algorithm: object, base: type, method: str) -> bool:
    """Whether something else than the method of `base` answers to its name, by a subclass or by an assignment.

    Example:
        >>> class Base:
        ...     def act(self): ...
        >>> class Derived(Base):
        ...     def act(self): ...
        >>> is_replaced(Base(), Base, "act"), is_replaced(Derived(), Base, "act")
        (False, True)
    """
    own = getattr(algorithm, method)
    # A function that was assigned to the object has no `__func__`, and counts as another.
    return getattr(own, "__func__", None) is not getattr(base, method)


def also_by_parts(update_mask: _Method) -> _Method:
    """Lets an `update_mask` of a view be called with the four arguments that preceded it, as subclasses may do.

    Example:
        >>> class Keeps:
        ...     @also_by_parts
        ...     def update_mask(self, view):
        ...         return view.mask
        >>> Keeps().update_mask(torch.ones(1), torch.tensor([True]), 0.0, None)
        tensor([True])
    """

    @functools.wraps(update_mask)
    def of_any_form(self: Any, view: WeightView | Tensor, *older: Any) -> Tensor:
        return update_mask(self, view if isinstance(view, WeightView) else WeightView.of(view, *older))

    return cast(_Method, of_any_form)


def call_update_mask(update_mask: UpdateMask, view: WeightView) -> Tensor:
    """Calls an `update_mask` of any form with a view.

    Args:
        update_mask: bound; of a view, of (weight, mask, sparsity), or of these and dense_grad.
        view: of the weight.

    Example:
        >>> view = WeightView.of(torch.ones(2), torch.tensor([True, False]), 0.5)
        >>> call_update_mask(lambda p, mask, sparsity: ~mask, view).tolist()
        [False, True]
    """
    count = arguments_of(update_mask)
    if count == 1:
        return update_mask(view)
    if count == 4:
        return update_mask(view.weight, view.mask, view.sparsity, view.gradient)
    # The three-argument form gets at gradients through the parameter.
    # A tensor of its own, so that `.grad` is not set on the one that others see.
    weight = view.weight.detach()
    weight.grad = view.gradient
    return update_mask(weight, view.mask, view.sparsity)


def arguments_of(update_mask: UpdateMask) -> int:
    """How many arguments an `update_mask` is called with.

    Raises:
        RarefyError: it takes neither a view, nor three, nor four arguments.

    Example:
        >>> arguments_of(lambda view: view.mask), arguments_of(lambda weight, mask, sparsity, dense_grad=None: mask)
        (1, 4)
    """
    parameters = inspect.signature(update_mask).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = sum(p.default is p.empty for p in positional)
    takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    needs_keywords = any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters)
    # `(view, *rest)` asks for a view, a bare `*parts` for all parts.
    most = max(_FORMS) if takes_any and required != 1 else len(positional)
    # The longest first: an argument with a default is given what it is for.
    for count in sorted(_FORMS, reverse=True):
        if required <= count <= most and not needs_keywords:
            return count
    owner = getattr(update_mask, "__qualname__", "update_mask")
    forms = " or ".join(f"update_mask(self, {form})" for form in _FORMS.values())
    raise RarefyError(f"{owner}{inspect.signature(update_mask)} cannot be called; write {forms}")
