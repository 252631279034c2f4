"""The optimizers that train sparse weights: steps are counted, gradients and states kept in order.

Who no longer steps does not hold the count back.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.algorithms.attachment.step_watch import Absence, StepWatch
from rarefy.errors import RarefyError
from rarefy.storage.masked import refuse_hidden
from rarefy.storage.optimizer_state import parts_in_step
from rarefy.storage.optimizer_traits import preserves_zeros, trained_parameters, with_inner
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.saved_state import load_entries, refuse_entries, save_entries
from rarefy.tensors import are_known_to_compilers
from rarefy.torch_private import put_first, was_told_to_skip
from rarefy.torch_private.compiled import hold_sizes, let_sizes_go
from rarefy.torch_private.ddp import outside_of_graphs


class Following:
    """The optimizers of one algorithm, and the count of their steps.

    Args:
        parameters: the sparse weights by name; the caller adds to it.
        before_step: called with each weight when its gradient is what the optimizer will use; with the optimizer if
            the weight is one of its own, else with None.
        settle: called with each weight when the optimizer is done with it, or is about to ask for another gradient.
        after_step: called when every sparse weight has taken one more step.
        end: called with each weight when forward passes may come again: it puts in place what they use.

    Attributes:
        optimizers: those that are followed.
        step: how many steps the sparse weights have taken.
    """

    def __init__(
        self,
        parameters: Mapping[str, SparseParameter],
        before_step: Callable[[SparseParameter, Optimizer | None], None],
        settle: Callable[[SparseParameter], None],
        after_step: Callable[[], None],
        end: Callable[[SparseParameter], None],
    ) -> None:
        self.optimizers: list[Optimizer] = []
        self.step = 0
        self._parameters = parameters
        self._trained: dict[str, nn.Parameter] = {}  # weak references would keep torch from swapping tensors
        self._watch = StepWatch()
        self._absence = Absence()
        # Places in `optimizers`, which a resumed run finds again, as its optimizers come in the same order.
        self._stepped: set[int] = set()
        self._set_aside: set[int] = set()
        # How many a run had that is resumed: those that come up to this number are no new ones. 0 once one stepped.
        self._had = 0
        self._before = before_step
        self._settle = settle
        self._after = after_step
        self._end = end

    def follow(self, optimizer: Optimizer) -> bool:
        """Follows an optimizer from now on; False if it is followed already."""
        if any(optimizer is other for other in self.optimizers):
            return False
        own = set(trained_parameters(optimizer))
        inner = [one for one in with_inner([optimizer])[1:] if own <= set(trained_parameters(one))]
        if inner:
            # SAM, Lookahead and their kin: the innermost takes the steps, and the wrapper may write afterwards.
            if put_first(optimizer.register_step_post_hook(lambda *_: self._prune_all(inner[-1]))):
                optimizer.register_step_post_hook(self._restore_zeros)
            return self.follow(inner[-1])
        for name, parameter in self._parameters.items():
            parameter.require_parameter()
            if parameter.weight in own:
                self._trained[name] = parameter.weight
        if optimizer.state:
            refuse_entries(self._parameters, optimizer)
        # One that comes in the middle of a training for weights of another goes on in its place, as fine-tuning does.
        if len(self.optimizers) >= self._had:
            self._set_aside |= self._replaced_by(optimizer)
        self.optimizers.append(optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        # An average that somebody takes after each step is one of the weights as they are when the step is over;
        # hooks of before may write weights too, by noise or a projection for example.
        if put_first(optimizer.register_step_post_hook(self._after_step)):
            optimizer.register_step_post_hook(self._restore_zeros)
        optimizer.register_state_dict_post_hook(partial(save_entries, self._parameters))
        optimizer.register_load_state_dict_pre_hook(partial(load_entries, self._parameters))
        optimizer.register_load_state_dict_post_hook(self._prune_all)
        # It may have stepped before, and have states where nothing is active now.
        self._prune_all(optimizer)
        return True

    def _replaced_by(self, optimizer: Optimizer) -> set[int]:
        known = [place for place in self._stepped if place < len(self.optimizers)]
        return {place for place in known if self._shares_weights(self.optimizers[place], optimizer)}

    def _shares_weights(self, one: Optimizer, other: Optimizer) -> bool:
        shared = trained_parameters(one).keys() & trained_parameters(other).keys()
        return any(parameter.weight in shared for parameter in self._parameters.values())

    @property
    def _in_use(self) -> list[Optimizer]:
        """Those that step, or will for all that is known."""
        return [one for place, one in enumerate(self.optimizers) if place not in self._set_aside]

    def saw_gradient(self, parameter: SparseParameter, grad: Tensor, version: int) -> None:
        """Called after each backward pass, to notice that nobody makes use of its gradients; see `StepWatch`."""
        self._watch.saw_gradient(parameter.name, grad, bool(self.optimizers), version)

    def is_frozen(self, parameter: SparseParameter) -> bool:
        """Whether a weight keeps its topology: nothing in use trains it, or `is_still` is true of all that does."""
        return self._is_still(parameter, self._in_use) or self._absence.is_noted(parameter.name)

    def is_still(self, parameter: SparseParameter, optimizer: Optimizer) -> bool:
        """Whether a step of an optimizer does not change a weight: no gradient is wanted, or its learning rate is 0."""
        return self._is_still(parameter, [optimizer])

    def _is_still(self, parameter: SparseParameter, optimizers: Iterable[Optimizer]) -> bool:
        weight = parameter.weight
        groups = [
            group
            for optimizer in optimizers
            for group in optimizer.param_groups
            if any(other is weight for other in group["params"])
        ]
        # Optimizers that work their rates out by themselves (Adafactor of transformers) have none, or None.
        rates = [1.0 if group.get("lr") is None else float(group["lr"]) for group in groups]
        # One that learned in this step and was frozen since, as a discriminator while its generator learns, is not.
        is_wanted = weight.requires_grad or parameter.has_learned
        return not is_wanted or bool(self.optimizers and not any(rates))

    @outside_of_graphs
    def _restore_zeros(self, *_: Any) -> None:
        for parameter in self._parameters.values():
            if parameter.is_in_place:
                parameter.storage.restore_zeros(self.optimizers)

    def _prune_all(self, optimizer: Optimizer) -> None:
        for parameter in self._parameters.values():
            parameter.prune([optimizer])

    @outside_of_graphs
    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        """Gets gradients and weights ready, after the closure where it is one that makes the gradients."""
        # `args[0]` is the optimizer itself.
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not callable(closure):
            self._get_ready(optimizer)
            return None
        wrapped = partial(self._call, optimizer, closure)
        return (
            ((args[0], wrapped, *args[2:]), kwargs)
            if len(args) > 1
            else (args, {**kwargs, "closure": wrapped})
        )

    def _call(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Any:
        for parameter in self._parameters.values():
            # Its dense gradient stays in use: that of each further call begins anew, so an update takes the last one's.
            self._settle(parameter)
            # LBFGS goes along directions of earlier steps, in which dropped connections have a part
            parameter.storage.restore_zeros(self.optimizers)
            self._end(parameter)
        loss = closure()
        self._watch.saw_step()  # LBFGS asks for many gradients in one step
        self._get_ready(optimizer)
        return loss

    @torch.no_grad()
    def _get_ready(self, optimizer: Optimizer) -> None:
        """Selects again the gradients that somebody changed after they were accumulated."""
        own = trained_parameters(optimizer)
        self._refuse_tied()
        for parameter in self._parameters.values():
            parameter.require_parameter()
            refuse_hidden(parameter.module, (parameter.places[0].leaf, parameter.storage.mask_leaf))
        self._refuse_replaced(optimizer, own)
        skips = was_told_to_skip(optimizer)
        for parameter in self._parameters.values():
            weight = parameter.weight
            parameter.storage.own_gradient()
            parameter.state.drop_draft()
            is_own = weight in own and not skips
            if is_own:
                # The optimizer goes on from the true numbers of all active connections.
                parameter.show()
                if weight.grad is None:
                    parameter.dense_gradient.discard()
            self._before(parameter, optimizer if is_own else None)
        if not skips and are_known_to_compilers():
            for parameter in self._parameters.values():
                if parameter.weight in own:
                    hold_sizes(parts_in_step(optimizer, parameter.weight))

    # A compiled step would otherwise have the whole update traced.
    @outside_of_graphs
    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        is_known = are_known_to_compilers()
        for parameter in self._parameters.values():
            if is_known:
                let_sizes_go(parts_in_step(optimizer, parameter.weight))
            self._settle(parameter)
            parameter.dense_gradient.used()
            parameter.state.keep_draft()
        if was_told_to_skip(optimizer):
            self._end_all()
            return
        now = trained_parameters(optimizer)
        # Weights of optimizers that have not stepped yet count as trained: they will.
        self._goes_on(optimizer)
        ever = set[nn.Parameter]().union(*map(trained_parameters, self._in_use))
        keeps_zeros = preserves_zeros(optimizer)
        for parameter in self._parameters.values():
            # Zero weight, gradient and state stay zero in such an optimizer;
            # it is enough to look for what others wrote.
            if not (keeps_zeros and parameter.storage.gradient_is_selected):
                parameter.prune([optimizer])
            elif parameter.weight in now or parameter.weight not in ever:
                parameter.storage.restore_zeros(self.optimizers)
        # Before anything is hidden again: an update is shown all active connections.
        self._count(optimizer, now, ever)
        self._end_all()

    def _goes_on(self, optimizer: Optimizer) -> None:
        """Notes that an optimizer steps, one that was set aside too."""
        place = next(place for place, one in enumerate(self.optimizers) if one is optimizer)
        self._set_aside.discard(place)
        self._stepped.add(place)
        self._had = 0

    def _end_all(self) -> None:
        for parameter in self._parameters.values():
            self._end(parameter)

    def _count(
        self, optimizer: Optimizer, now: Container[nn.Parameter], ever: Container[nn.Parameter]
    ) -> None:
        """Step k is over when every sparse parameter that is trained at all has taken its k-th step."""
        trained = {
            name: p.weight in now
            for name, p in self._parameters.items()
            if p.weight in now or (p.weight in ever and (p.weight.requires_grad or p.has_learned))
        }
        self._absence.saw_step(trained)
        involved = []
        for name, parameter in self._parameters.items():
            # Weights that nothing trains are carried along, or they would hold the count back.
            counts = name in trained and not self._absence.is_noted(name)
            parameter.steps = parameter.steps + trained[name] if counts else self.step + 1
            involved += [parameter.steps] if counts else []
        if any(parameter.weight in now for parameter in self._parameters.values()):
            self._watch.saw_step()
        if not involved:
            self._refuse_strangers(optimizer)
        if not involved or min(involved) <= self.step:
            return
        self.step += 1
        # Counted before the algorithm hears of it, so that an update finds its own number.
        self._after()

    def state(self) -> dict[str, Any]:
        """Which optimizers have stepped, and where they are apart by how much, and which are used no longer."""
        ahead = {name: p.steps - self.step for name, p in self._parameters.items() if p.steps != self.step}
        state: dict[str, Any] = {"had": len(self.optimizers), "stepped": sorted(self._stepped)}
        if ahead or self._set_aside:
            state |= {"ahead": ahead, "set_aside": sorted(self._set_aside), **self._absence.state()}
        return {"counting": state} if self._stepped else {}

    def load(self, state: Mapping[str, Any]) -> None:
        """Goes on counting from a state that has the step, and what `state` returned."""
        self.step = state["step"]
        counting = state.get("counting", {})
        for name, parameter in self._parameters.items():
            parameter.steps = self.step + counting.get("ahead", {}).get(name, 0)
        self._set_aside = set(counting.get("set_aside", ()))
        self._stepped = set(counting.get("stepped", ()))
        self._had = counting.get("had", 0)
        self._absence.load(counting)

    def _refuse_tied(self) -> None:
        """Notices that two weights have become one, which cannot have two masks.

        Raises:
            RarefyError: they have.
        """
        names: dict[Tensor, str] = {}
        for name, parameter in self._parameters.items():
            # None where it was taken out of its module, which is refused next.
            weight = getattr(parameter, "weight", None)
            if weight is not None and names.setdefault(weight, name) != name:
                raise RarefyError(
                    f"{names[weight]} and {name} are one tensor now, and have two masks; tie weights before "
                    "sparsity.apply(model), or leave one of them out of param_filter"
                )

    def _refuse_replaced(self, optimizer: Optimizer, own: Container[nn.Parameter]) -> None:
        """Notices that a weight is another tensor by now, which no optimizer has, while this one goes on with the old.

        Raises:
            RarefyError: it is.
        """
        for name, parameter in self._parameters.items():
            weight = parameter.weight
            old = self._trained.get(name)
            if weight in own:
                self._trained[name] = weight
            elif old is not None and old is not weight and old in own and not self._is_trained(weight):
                raise RarefyError(
                    f"{name} is another tensor than the one that {type(optimizer).__name__} trains: "
                    "load_state_dict(assign=True), an assignment to the module or a conversion replaced the parameter, "
                    "so that it would not learn; build the optimizer anew from model.parameters() and call "
                    "sparsity.apply(optimizer), or load without assign"
                )

    def _is_trained(self, weight: nn.Parameter) -> bool:
        return any(weight in trained_parameters(optimizer) for optimizer in self.optimizers)

    def _refuse_strangers(self, optimizer: Optimizer) -> None:
        """Called where no followed optimizer trains a sparse weight: says so, if they could learn.

        Raises:
            RarefyError: the weights get gradients all the same.
        """
        wanted = [parameter for parameter in self._parameters.values() if parameter.weight.requires_grad]
        waiting = [parameter.name for parameter in wanted if parameter.weight.grad is not None]
        if wanted and not waiting:
            self._watch.saw_stranger(type(optimizer).__name__, wanted[0].name)
        if waiting and len(waiting) == len(self._parameters):
            raise RarefyError(
                f"{type(optimizer).__name__} trains none of the sparse weights ({waiting[0]} …), though they get "
                "gradients: it holds other tensors, a flat buffer or the parameters of a copy; build it from the "
                "parameters of the model that sparsity was applied to"
            )
