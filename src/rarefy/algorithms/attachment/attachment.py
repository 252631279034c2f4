"""What holds a policy and the weights of a model together: hooks on modules and gradients, and when updates come."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.algorithms.attachment.averaging import Averaging
from rarefy.algorithms.attachment.copies import COPIED, PICKLED, Copies, follow_topology, own_mask, place_of
from rarefy.algorithms.attachment.following import Following
from rarefy.algorithms.attachment.gradient_hooks import GradientHooks, is_watched
from rarefy.algorithms.attachment.keeper import Keeper, reclaim, refuse_passed_on, warn_of_writes
from rarefy.algorithms.attachment.policy import Policy
from rarefy.algorithms.attachment.saving import keep_masks_out, load_weights_state, weights_state
from rarefy.algorithms.attachment.trained_form import TrainedForms
from rarefy.algorithms.view import Numbers, StepView
from rarefy.distributed import Traffic, ranks, reshard
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.patterns import Pattern
from rarefy.storage.choice import TIMED_AT, choose_storage, restore_storage, storage_state
from rarefy.storage.gradients import Shortlist, refuse_layout
from rarefy.storage.masked import refuse_lost_mask
from rarefy.storage.parameter import SparseParameter
from rarefy.torch_private import scale_in_gradients, times_written


class Attachment:
    """The sparse weights of one policy, and everything that is registered with torch on its behalf.

    Args:
        policy: the algorithm that decides.

    Attributes:
        parameters: the sparse weights by name.
        optimizers: those that are followed.
    """

    def __init__(self, policy: Policy) -> None:
        self.parameters: dict[str, SparseParameter] = {}
        self._policy = policy
        self._models: list[weakref.ref[nn.Module]] = []
        self._forms = TrainedForms(policy)
        calls = self._before_step, self._forms.leave, self._step_is_over, self._forms.end
        self._following = Following(self.parameters, *calls)
        self.optimizers = self._following.optimizers
        self._copies: Copies | None = None
        self._averaging = Averaging(self.parameters, self.set_mask)
        self._gradients = GradientHooks(self._before_accumulation, self._after_accumulation)

    def __deepcopy__(self, memo: dict[int, Any]) -> Attachment:
        """Of a copied algorithm, which holds no model: hooks of modules and optimizers do not go along."""
        if self.parameters:
            warnings.warn(COPIED, RuntimeWarning, stacklevel=2)
        # Found in the memo: the copy of the policy is what this attachment is being copied for.
        return Attachment(copy.deepcopy(self._policy, memo))

    def __reduce__(self) -> Any:
        raise RarefyError(PICKLED)

    @property
    def step(self) -> int:
        """How many optimizer steps the sparse weights have taken."""
        return self._following.step

    @step.setter
    def step(self, value: int) -> None:
        self._following.step = value

    @property
    def traffic(self) -> Traffic:
        """What this process gave into the averages of gradients so far."""
        return self._averaging.traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self._averaging.traffic = traffic

    def follow(self, optimizer: Optimizer) -> None:
        """Counts an optimizer's steps from now on, and keeps its state in order."""
        self.forget_removed()
        self._forms.check_optimizer(optimizer)
        if self._following.follow(optimizer):
            # What `fully_shard` has cut since has another parameter.
            for parameter in self.parameters.values():
                self._find(parameter)
            self.choose_storage()

    # ---- weights ----

    def refuse_taken(self, name: str, candidate: Candidate) -> None:
        """Refuses a weight that an algorithm has already, this one or another.

        Raises:
            RarefyError: it has.
        """
        known = self.parameters.get(name)
        if known is not None and known.weight is candidate.parameter:
            raise RarefyError(
                f"{name} is sparse already, by this algorithm; apply it once, or call rarefy.finalize(model) first "
                "and apply a new one"
            )
        if known is not None:
            raise RarefyError(f"a second parameter is called {name}; apply to the module that holds both")
        if is_watched(candidate.parameter):
            raise RarefyError(
                f"{name} has a sparsity algorithm already; use one algorithm, or a Group of several"
            )

    @staticmethod
    def reclaim(chosen: Mapping[str, Candidate]) -> None:
        """Takes weights over from algorithms that no longer live."""
        for candidate in chosen.values():
            reclaim(candidate)

    def adopt(self, candidate: Candidate, pattern: Pattern) -> SparseParameter:
        """Takes a weight on; all of its connections are active until its first mask comes."""
        first = candidate.places[0]
        parameter = SparseParameter(candidate, pattern)
        # A weight that joins late counts from here, or the others would wait for it to catch up.
        parameter.steps = self.step
        parameter.start_state(self._policy.connection_state)
        # Where one backward pass a step was promised, the gradient is shortened as it arrives, before that of the
        # next layer is there.
        parameter.dense_gradient.shorten = partial(self._shorten, parameter)
        self._gradients.watch(parameter, self._policy.needs == "dense")
        keeper = Keeper(
            first.module,
            first.leaf,
            parameter.mask_leaf,
            observe=partial(self._before_forward, parameter),
            prune=partial(self._before_state_dict, parameter),
            before_load=partial(self._forms.before_load, parameter, self._following.optimizers),
            on_load=partial(self._after_load, parameter),
            on_release=partial(self._release, parameter),
        )
        self._averaging.watch(keeper, parameter)
        # After the averaging, whose `on_forward` it takes on and calls.
        self._forms.watch(keeper, parameter)
        keeper.register(dict.fromkeys(place.module for place in candidate.places))
        self.parameters[candidate.name] = parameter
        return parameter

    def adopted(self) -> None:
        """Called when all weights of a model are taken on and have their first masks."""
        masks = [name.rpartition(".")[0] + "." + one.mask_leaf for name, one in self.parameters.items()]
        for model in self._living():
            keep_masks_out(model, [mask.removeprefix(".") for mask in masks])
        self.choose_storage()

    def belongs_to(self, model: nn.Module) -> None:
        """Remembers the model that weights were taken from."""
        # The last forward pass may have left whole weights in the place of the pieces.
        reshard(model)
        # Weakly: an algorithm that somebody keeps must not keep the model in memory.
        self._models.append(weakref.ref(model))
        self._averaging.leave_out(model)

    def models(self) -> list[nn.Module]:
        """Those that weights were taken from and that still live; weights that they have lost are forgotten."""
        self.forget_removed()
        return self._living()

    def _living(self) -> list[nn.Module]:
        alive = (reference() for reference in self._models)
        return list(dict.fromkeys(model for model in alive if model is not None))

    def forget_removed(self) -> None:
        """Forgets weights whose layers are no longer in their model: a head that was replaced, a layer that was cut.

        Raises:
            RarefyError: another layer has the same parameter now.
        """
        alive = self._living()
        # With a model gone nobody can tell a layer that was removed from one that belonged to it.
        if not alive or any(reference() is None for reference in self._models):
            return
        present = {module for model in alive for module in model.modules()}
        for parameter in list(self.parameters.values()):
            if not any(place.module in present for place in parameter.places):
                refuse_passed_on(parameter, present)
                self._release(parameter)

    def set_mask(self, parameter: SparseParameter, mask: Tensor) -> None:
        """Gives a weight a new topology, and its optimizers' state with it."""
        # Masked storage writes the new mask over the old one.
        before = mask if self._copies is None else parameter.mask.clone()
        parameter.set_mask(mask, self._following.optimizers)
        if self._copies is not None:
            weight = parameter.dense_weight()
            self._copies.follow(parameter.name, parameter.mask_leaf, before, mask, weight)

    def track(self, copy: nn.Module) -> None:
        """Lets a copy of the model follow its topology from now on, and gives it that of now.

        Raises:
            RarefyError: there is no sparse weight yet, the copy lacks one, or `fully_shard` cut one.
        """
        cut = next((name for name, parameter in self.parameters.items() if parameter.is_sharded), None)
        if cut is not None:
            raise RarefyError(
                f"track is not allowed for a model whose {cut} was cut by fully_shard; average the pieces by yourself, "
                "or finalize first"
            )
        if not self.parameters:
            raise RarefyError("track comes after apply(model): no weight is sparse yet")
        self._copies = self._copies or Copies()
        prefix = self._copies.add(copy, list(self.parameters))
        for name, parameter in self.parameters.items():
            module, leaf = place_of(copy, prefix + name)
            # A copy without a mask counts as one of today's topology, to which nothing is new.
            old = own_mask(module, leaf, parameter.mask_leaf)
            follow_topology(
                module,
                leaf,
                parameter.mask_leaf,
                parameter.mask if old is None else old.clone(),
                parameter.mask,
                parameter.true_weight(),
            )

    def is_frozen(self, parameter: SparseParameter) -> bool:
        """Whether a weight cannot learn, and keeps its topology therefore."""
        return self._following.is_frozen(parameter)

    def choose_storage(self, *, in_step: bool = False) -> None:
        """Gives parameters the storage that `compute` asks for at their present sparsity.

        Several processes agree on what `auto` chooses, in a step, when all of them are here.
        """
        # A weight that waits for its first mask is dense, and would be held as a long list of connections.
        ready = {name: one for name, one in self.parameters.items() if name not in self._policy.awaiting}
        if ranks() == 1 or self._policy.compute != "auto":
            step = self.step if in_step else None
            choose_storage(ready, self._policy.compute, self._following.optimizers, step)
        # In a step all processes are here, so they may exchange what they would choose. Only weights whose
        # gradients are averaged here may change: a wrapper that averages them itself has buckets of dense size.
        elif in_step:
            averaged = {name: one for name, one in ready.items() if self._averaging.covers(one)}
            choose_storage(averaged, "auto", self._following.optimizers, self.step)
        self.prepare()

    def _release(self, parameter: SparseParameter) -> None:
        """Forgets a parameter of a finalized model; its optimizers may go on with the dense weight."""
        self._averaging.release(parameter)
        # Without its mask nothing tells which entries are connections.
        if not parameter.storage.has_lost_mask:
            if parameter.is_in_place:
                self._forms.settle(parameter)
            parameter.become("masked", self._following.optimizers)
            if parameter.is_in_place:
                parameter.storage.restore_zeros(self._following.optimizers)
        self.parameters.pop(parameter.name, None)
        self._forms.release(parameter)
        self._gradients.release(parameter)

    def _before_state_dict(self, parameter: SparseParameter) -> None:
        """Restores the zeros, so that files have them."""
        refuse_lost_mask(parameter.storage)
        if parameter.is_in_place and parameter.storage.restore_zeros(self._following.optimizers):
            warn_of_writes(parameter.name)

    def _after_load(self, parameter: SparseParameter) -> None:
        """Follows a parameter whose module loaded a state dict, by copy or by assignment."""
        self._find(parameter)
        parameter.after_load(self._following.optimizers)

    def _find(self, parameter: SparseParameter) -> None:
        """Follows a parameter that was replaced by another one in its module."""
        self._gradients.find(parameter, self._policy.needs == "dense")

    # ---- gradients ----

    def _is_update_step(self, step: int) -> bool:
        return self._policy.autoupdate and self._policy.update_schedule(step)

    def _collects_dense_grad(self) -> bool:
        """Whether the optimizer step that comes next may be an update step that wants dense gradients."""
        policy = self._policy
        return policy.needs == "dense" and (not policy.autoupdate or policy.update_schedule(self.step + 1))

    def prepare(self) -> None:
        """Asks for the dense gradients that the coming update needs, from storage that has to know before."""
        wanted = self._collects_dense_grad()
        for parameter in self.parameters.values():
            parameter.want_dense_gradient(wanted)

    def _before_forward(self, parameter: SparseParameter, x: Tensor) -> None:
        """Called with what a module that trains is about to compute with."""
        parameter.observe(x)
        self._find(parameter)
        if self._collects_dense_grad():
            parameter.before_forward()

    def _before_accumulation(self, parameter: SparseParameter, grad: Tensor) -> None:
        if self._collects_dense_grad():
            parameter.require_parameter()
            parameter.before_accumulation()

    def _after_accumulation(self, parameter: SparseParameter, weight: Tensor) -> None:
        grad = weight.grad
        if grad is None:
            return
        parameter.require_parameter()
        if weight is not parameter.weight:
            return  # one that another has replaced may go on learning elsewhere
        self._forms.refuse_left(parameter)
        refuse_layout(parameter.name, grad)
        # Before the zeros are put in place, which is a write too.
        version = times_written(grad)
        parameter.after_accumulation(grad, self._collects_dense_grad())
        # Updates by hand need no optimizer that is followed.
        if self._policy.autoupdate:
            self._following.saw_gradient(parameter, grad, version)
        self._averaging.saw_gradient(parameter)

    def _shorten(self, parameter: SparseParameter, grad: Tensor) -> Tensor | Shortlist:
        """What has to be held of a dense gradient that arrived in whole."""
        request = self._policy.gradient_request()
        return grad if request is None else request.shorten(parameter, grad)

    # ---- steps ----

    def _before_step(self, parameter: SparseParameter, optimizer: Optimizer | None) -> None:
        """Called when the gradient is what an optimizer is about to use; without one that of another weight."""
        self._find(parameter)
        self._forms.begin(parameter)
        grad = parameter.weight.grad
        if grad is not None:
            refuse_layout(parameter.name, grad)
        if optimizer is None or grad is None:
            parameter.storage.select_gradient(None)
            return
        # Noted now: it may be frozen by the time the step of all weights is over.
        parameter.has_learned = parameter.weight.requires_grad
        scale = scale_in_gradients(optimizer)
        policy = self._policy
        wants_active = policy.needs == "active" and self._is_update_step(self.step + 1)
        parameter.finish_gradient(self._collects_dense_grad(), wants_active, scale)
        # Not in place: whoever holds the scale takes it out of the gradient later.
        if policy.observes:
            unscaled = grad if scale is None else grad / scale
            weight = parameter.storage.entries.detach()
            gradient = parameter.storage.collect(unscaled.detach())
            state = Numbers(parameter.state.draft(weight.device))
            policy.observe(StepView(parameter.name, weight, gradient, state, self.step + 1))
        if parameter.has_learned and policy.reparametrizes:
            self._forms.enter(parameter, self._following.is_still(parameter, optimizer))

    def _step_is_over(self) -> None:
        """Called when every sparse weight has taken one more step."""
        is_update = self._is_update_step(self.step)
        if is_update:
            self.forget_removed()
            self._policy.update()
        for parameter in self.parameters.values():
            # Not before the update, which takes the gradient; what arrives from here on belongs to the next step.
            parameter.dense_gradient.reopen()
            parameter.has_learned = False
        # From the first step it is known how many tokens each layer sees.
        if is_update or self.step in (1, TIMED_AT):
            self.choose_storage(in_step=True)
        self.prepare()

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """What belongs to weights: storage, dense gradients, connection state."""
        weights = {**storage_state(self.parameters), **weights_state(self.parameters)}
        return {**weights, **self._following.state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from an algorithm's state, which was checked."""
        self._following.load(state)
        # First: what follows is held as the storage holds the weight.
        if self._policy.compute == "auto":
            # A wrapper that averages gradients of dense size could not go on with compact storage.
            may = {
                name: p for name, p in self.parameters.items() if ranks() == 1 or self._averaging.covers(p)
            }
            restore_storage(may, state, self._following.optimizers)
        self.prepare()
        load_weights_state(self.parameters, state)
