"""Weights that an optimizer trains in another form, or with other values, than the model computes with."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.optim import Optimizer

from rarefy.algorithms.attachment.keeper import Keeper
from rarefy.errors import RarefyError
from rarefy.storage.parameter import SparseParameter


class Form(Protocol):
    """The form that optimizers train, of numbers each by itself; zero is zero in both."""

    @property
    def reparametrizes(self) -> bool:
        """Whether it is another than the weight."""
        ...

    @property
    def restricts_forward(self) -> bool:
        """Whether forward passes use a part of what is trained."""
        ...

    def trained_form(self, weight: Tensor) -> Tensor:
        """What the optimizer trains in the place of the weight."""
        ...

    def weight_of(self, trained: Tensor) -> Tensor:
        """The reverse."""
        ...

    def slope(self, trained: Tensor) -> Tensor:
        """The derivative of `weight_of`."""
        ...


class TrainedForms:
    """Puts the trained form into weights for the time of an optimizer's step, and the gradient by it beside them.

    At all other times the weight is what the model computes with, so that whatever reads, copies, saves or averages it
    finds that; the states of the optimizer belong to the trained form.

    Args:
        form: of the algorithm.
    """

    def __init__(self, form: Form) -> None:
        self._form = form
        # By name: the gradient by the weight, and the one that the optimizer is given.
        self._gradients: dict[str, tuple[Tensor, Tensor]] = {}
        # By name: what was the weight in the last step, or at first.
        self._stepped: dict[str, Tensor] = {}
        # What is to be put back before any of them is used: of a layer whose own module is not called, too.
        self._watched: dict[str, SparseParameter] = {}
        # By name: entries that stay as they are in this step, to the last bit.
        self._kept: dict[str, Tensor] = {}
        self._keepers: dict[str, Keeper] = {}

    def watch(self, use: Keeper, parameter: SparseParameter) -> None:
        """Puts a weight back before it is used: a step that raised an error may have left the trained form behind."""
        if self._form.reparametrizes or self._form.restricts_forward:
            self._keepers[parameter.name] = use
            self._watched[parameter.name] = parameter
            self._stepped[parameter.name] = parameter.weight
            use.used_weight = partial(self._used_weight, parameter)
        if self._form.reparametrizes:
            self._leave_before(use)
        if self._form.restricts_forward:
            self._hide_before(use)

    @torch.no_grad()
    def _used_weight(self, parameter: SparseParameter) -> Tensor | None:
        """The weight as forward passes use it, where something else is in its place: within a step; else None."""
        has_entered = self._has_entered(parameter)
        if not has_entered and not parameter.forward.is_showing:
            return None
        entries = parameter.storage.entries.detach()
        if has_entered:
            kept = self._kept.get(parameter.name)
            entries = self._form.weight_of(entries) if kept is None else kept
        return parameter.as_used(entries)

    def begin(self, parameter: SparseParameter) -> None:
        """Called before a step, from which on the weight may not be what forward passes use."""
        if parameter.name in self._keepers:
            self._keepers[parameter.name].is_in_step = True
            self._stepped[parameter.name] = parameter.weight

    def end(self, parameter: SparseParameter) -> None:
        """Called after a step; from now on the weight is what forward passes use."""
        parameter.hide()
        if parameter.name in self._keepers:
            self._keepers[parameter.name].is_in_step = False

    def _leave_before(self, use: Keeper) -> None:
        others = use.on_forward

        def settle() -> None:
            if use.is_in_step or self._gradients:
                self._recover_all()
            if others is not None:
                others()

        use.on_forward = settle

    def _recover_all(self) -> None:
        """Of all weights, since layers may use those of others that are not called: the output map of attention."""
        for name, parameter in self._watched.items():
            self.recover(parameter)
            keeper = self._keepers[name]
            # Weights of other optimizers were not touched by the step that raised an error.
            keeper.is_in_step = keeper.is_in_step and name in self._gradients

    def _hide_before(self, use: Keeper) -> None:
        others = use.on_forward

        def settle() -> None:
            if others is not None:
                others()
            self._hide_all()

        use.on_forward = settle

    def _hide_all(self) -> None:
        for name, parameter in self._watched.items():
            keeper = self._keepers[name]
            # A step that raised an error has left all values in place.
            may_show = keeper.is_in_step or not parameter.forward.is_hiding
            if may_show and parameter.is_in_place and self._is_the_one(parameter):
                parameter.hide()
                keeper.is_in_step = False

    def refuse_left(self, parameter: SparseParameter) -> None:
        """Refuses a gradient that came without the modules, after a step that raised an error.

        Raises:
            RarefyError: what the optimizer trains was still in the place of the weight, and was computed with.
        """
        keeper = self._keepers.get(parameter.name)
        if keeper is not None and keeper.is_in_step:
            raise RarefyError(
                f"{parameter.name} was used without its module after a step that raised an error, which has left there "
                f"what the optimizer trains by {type(self._form).__name__}; call the module once, which puts it back "
                "(under torch.no_grad() too), or load a state dict, before weights are used by themselves"
            )

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuses an optimizer that writes to weights between its steps, where they are not what it trains.

        Raises:
            RarefyError: it has modes for training and evaluation, as schedule-free ones do.
        """
        if not callable(getattr(optimizer, "eval", None)):
            return
        if self._form.reparametrizes:
            why = "has them in the form that it trains only within a step"
        elif self._form.restricts_forward:
            why = "keeps the values that forward passes do not use out of them until the next step"
        else:
            return
        raise RarefyError(
            f"{type(optimizer).__name__} exchanges weights between its steps (eval(), train()), and "
            f"{type(self._form).__name__} {why}; take another optimizer, or another algorithm"
        )

    @torch.no_grad()
    def enter(self, parameter: SparseParameter, is_frozen: bool = False) -> None:
        """Puts the trained form of a weight and its gradient in place; there are a form and a gradient.

        Args:
            parameter: the weight.
            is_frozen: whether the step does not change it, though the optimizer's states go on (a learning rate of 0).
        """
        self.recover(parameter)
        storage = parameter.storage
        weight = parameter.weight
        gradient = weight.grad
        assert gradient is not None
        entries = storage.entries.data
        if is_frozen:
            self._kept[parameter.name] = entries.clone()
        entries.copy_(self._form.trained_form(entries))
        # A tensor of its own, as the gradient by the weight comes back after the step.
        trained = gradient.clone()
        storage.collect(trained).mul_(self._form.slope(entries))
        weight.grad = trained
        self._gradients[parameter.name] = (gradient, trained)

    def _has_entered(self, parameter: SparseParameter) -> bool:
        """Whether the trained form is in place."""
        return parameter.name in self._gradients and self._is_the_one(parameter)

    def _is_the_one(self, parameter: SparseParameter) -> bool:
        """Whether the module has what the last step was of, and no other weight for a call (`functional_call`)."""
        return getattr(parameter, "weight", None) is self._stepped.get(parameter.name)

    def leave(self, parameter: SparseParameter) -> None:
        """Puts weight and gradient back, if the trained form is in place."""
        if self._has_entered(parameter):
            self._leave(parameter)

    @torch.no_grad()
    def _leave(self, parameter: SparseParameter) -> None:
        gradient, trained = self._gradients.pop(parameter.name)
        entries = parameter.storage.entries.data
        kept = self._kept.pop(parameter.name, None)
        entries.copy_(self._form.weight_of(entries) if kept is None else kept)
        # Where the optimizer has thrown the gradient away, it stays away.
        if parameter.weight.grad is trained:
            parameter.weight.grad = gradient

    @torch.no_grad()
    def recover(self, parameter: SparseParameter) -> None:
        """Puts weight and gradient back that a step left behind which raised an error."""
        if self._has_entered(parameter):
            gradient, trained = self._gradients[parameter.name]
            # Since then `zero_grad(set_to_none=False)` may have zeroed the one that is in the place of the other.
            if trained is parameter.weight.grad and not parameter.storage.collect(trained).any():
                gradient.zero_()
        self.leave(parameter)

    def settle(self, parameter: SparseParameter) -> None:
        """Takes out of a weight what the optimizer trains, which a step that raised an error may have left there."""
        self.recover(parameter)
        parameter.hide()

    def before_load(
        self, parameter: SparseParameter, optimizers: Iterable[Optimizer], mask: Tensor | None
    ) -> None:
        """Called before a state dict is loaded, which holds what forward passes use and not what is trained.

        Args:
            parameter: the weight.
            optimizers: those whose state follows its connections.
            mask: that the state dict has; None without one.
        """
        if parameter.name in self._keepers:
            if parameter.storage.has_lost_mask:
                self._forget_step(parameter)
            elif parameter.is_in_place:
                self.settle(parameter)
            self._keepers[parameter.name].is_in_step = False
        if mask is not None:
            parameter.before_load(mask, optimizers)

    def _forget_step(self, parameter: SparseParameter) -> None:
        self._gradients.pop(parameter.name, None)
        self._kept.pop(parameter.name, None)

    def release(self, parameter: SparseParameter) -> None:
        """Forgets a weight."""
        self._forget_step(parameter)
        self._keepers.pop(parameter.name, None)
        self._watched.pop(parameter.name, None)
        self._stepped.pop(parameter.name, None)
