"""What every algorithm shares: masks on a model, a step counter behind the optimizer, hooks, state.

The only file of rarefy that registers hooks with torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rarefy import filters
from rarefy.algorithms.few_connections import few_connections, warn_of_few
from rarefy.algorithms.keep_pruned import KeepPruned, reclaim
from rarefy.algorithms.options import check_compute, check_reach, check_seed, parse_fraction
from rarefy.algorithms.state import check_state, gradient_state, refuse_taken, register
from rarefy.distributed import agreed_seed
from rarefy.distributions import check_distribution, share_out
from rarefy.errors import ConfigError, RarefyError
from rarefy.filters import Candidate
from rarefy.initializers import generator_for, parse_initializer
from rarefy.patterns import Pattern, parse_pattern
from rarefy.schedules import AtSteps, Schedule, UpdateSchedule, next_update
from rarefy.storage.choice import check_compact, choose_storage, restore_storage, storage_state
from rarefy.storage.optimizer_traits import preserves_zeros, skipped_its_step, trained_by
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.saved_state import load_entries, save_entries

SparsityHook = Callable[["SparsityAlgorithm", str, float], None]
TopologyHook = Callable[["SparsityAlgorithm", str, Tensor, Tensor], None]


class SparsityAlgorithm(ABC):
    """Decides which connections of a model are active.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        init_method: `random`, `topk`, `from_zeros`, `checkerboard`, or a function (weight, sparsity) -> mask.
        param_filter: glob or list of globs over parameter names; None for the default filter.
        balance_in_groups: equal counts in this many groups of input features, or None.
        balance_out_groups: equal counts in this many groups of output features, or None.
        distribution: `uniform`, `er` or `erk`; how the sparsity is shared out among the parameters.
        pattern: `unstructured`, `{n: 2, m: 4}` or `{block: [8, 8]}`; what masks look like.
        compute: `auto`, `masked` or `compact`; how the weights are stored.
        seed: for everything random; None takes torch's seed when the algorithm is applied.

    Attributes:
        accumulates: False promises one backward pass per optimizer step; RigL then saves memory in compact storage.

    Raises:
        ConfigError: a value that is not allowed, with the name of its option.
    """

    name: ClassVar[str] = ""
    dynamic: ClassVar[bool] = False
    needs_dense_grad: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: Any,
        *,
        init_method: Any = "random",
        param_filter: Any = None,
        balance_in_groups: int | None = None,
        balance_out_groups: int | None = None,
        distribution: str = "uniform",
        pattern: Any = "unstructured",
        compute: str = "auto",
        seed: int | None = None,
    ) -> None:
        self.sparsity: Schedule = parse_fraction(sparsity, "sparsity", below_one=True)
        self.init_method = parse_initializer(init_method)
        self.globs = filters.check_filter(param_filter)
        self.pattern = parse_pattern(pattern, balance_in_groups, balance_out_groups)
        self.distribution = check_distribution(distribution)
        check_reach(self.sparsity, self.pattern.structure, self.distribution)
        self.compute = check_compute(compute)
        self.seed = check_seed(seed)
        self.update_schedule: UpdateSchedule = AtSteps([0])
        self.paths: Mapping[str, str] = {}
        self.parameters: dict[str, SparseParameter] = {}
        self._patterns: dict[str, Pattern] = {}
        self.step, self.updates, self.target_sparsity = 0, 0, 0.0
        self._autoupdate, self.accumulates = True, True
        self._optimizers: list[Optimizer] = []
        self._gradient_handles: dict[str, tuple[nn.Parameter, list[RemovableHandle]]] = {}
        self._target_hooks: OrderedDict[int, SparsityHook] = OrderedDict()
        self._computed_hooks: OrderedDict[int, SparsityHook] = OrderedDict()
        self._topology_hooks: OrderedDict[int, TopologyHook] = OrderedDict()

    @property
    def algorithms(self) -> list[SparsityAlgorithm]:
        """Itself alone; the members of a group."""
        return [self]

    @property
    def autoupdate(self) -> bool:
        """Whether updates run by themselves after optimizer steps."""
        return self._autoupdate

    @autoupdate.setter
    def autoupdate(self, value: bool) -> None:
        self._autoupdate = value
        self._prepare()

    # ---- applying ----

    def apply(self, target: nn.Module | Optimizer) -> None:
        """Makes a model sparse, or follows an optimizer; in either order, and several of each.

        Args:
            target: a module (its chosen weights get masks and exact zeros at once) or an optimizer (topology
                updates run after its steps).

        Raises:
            ConfigError: the filter matches nothing, or the pattern does not divide a weight.
            RarefyError: a parameter already has an algorithm, or `target` is something else.
        """
        if isinstance(target, nn.Module):
            chosen = self.select(target)
            self.apply_to(chosen)
            warn_of_few(target, few_connections(self, chosen), chosen)
        elif isinstance(target, Optimizer):
            self._follow(target)
        else:
            raise RarefyError(f"apply takes a torch module or a torch optimizer, not {type(target).__name__}")

    def select(self, model: nn.Module) -> dict[str, Candidate]:
        """The parameters that this algorithm's filter chooses, by name.

        Raises:
            ConfigError: the filter, or one glob of it, matches nothing.
        """
        try:
            return filters.select(model, self.globs)
        except ConfigError as error:
            raise error.under(self.paths.get(error.path, "")) from None

    def check(self, chosen: Mapping[str, Candidate]) -> None:
        """Refuses parameters that cannot become sparse, before anything is changed.

        Raises:
            ConfigError: a pattern does not divide a weight, or it cannot have the compact storage that is asked for.
            RarefyError: a parameter already has an algorithm.
        """
        for name, candidate in chosen.items():
            try:
                self.pattern.on(candidate.axes).check(name, candidate.shape)
                if self.compute == "compact":
                    check_compact(candidate)
            except ConfigError as error:
                raise error.under(self.paths.get(error.path, "")) from None
            refuse_taken(candidate, self.parameters)

    def apply_to(self, chosen: Mapping[str, Candidate]) -> None:
        """Makes exactly these parameters sparse; a group shares a model out with it.

        Args:
            chosen: parameters by name.

        Raises:
            ConfigError: the pattern does not divide a weight.
            RarefyError: a parameter already has an algorithm.
        """
        self.check(chosen)
        if self.seed is None:
            self.seed = agreed_seed(torch.initial_seed())
        for candidate in chosen.values():
            reclaim(candidate)
        self._patterns |= {name: self.pattern.on(candidate.axes) for name, candidate in chosen.items()}
        first = self.first_masks({name: candidate.parameter for name, candidate in chosen.items()})
        for name, candidate in chosen.items():
            self.parameters[name] = self._adopt(candidate)
            self._set_mask(self.parameters[name], first[name])
        self._choose_storage()

    @torch.no_grad()
    def first_masks(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The masks of step 0: by `init_method` if step 0 is an update step, else all True.

        Args:
            weights: dense weights by parameter name.
        """
        if not self.update_schedule(0):
            return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        targets = self._targets({name: weight.shape for name, weight in weights.items()})
        self.updates = max(self.updates, 1)
        return {name: self._first_mask(name, weights[name], target) for name, target in targets.items()}

    def _first_mask(self, name: str, weight: Tensor, sparsity: float) -> Tensor:
        options = sparsity, generator_for(self.seed or 0, name, 0), self.pattern.structure
        pattern = self._patterns[name]
        pieces = pattern.split(weight.detach())
        return pattern.merge([self.init_method(piece, *options) for piece in pieces])

    def _adopt(self, candidate: Candidate) -> SparseParameter:
        first, parameter = candidate.places[0], SparseParameter(candidate, self.pattern)
        parameter.steps = self.step
        self._watch_gradient(parameter)
        hooks = partial(self._after_load, parameter), partial(self._release, parameter)
        keeper = KeepPruned(first.module, first.leaf, parameter.observe, *hooks)
        for module in dict.fromkeys(place.module for place in candidate.places):
            module.register_forward_pre_hook(keeper.before_forward, with_kwargs=True)
            module.register_state_dict_pre_hook(keeper.before_use)
            module.register_load_state_dict_post_hook(keeper.after_load)
        return parameter

    def _choose_storage(self) -> None:
        """Gives parameters the storage that `compute` asks for at their present sparsity."""
        choose_storage(self.parameters, self.compute, self._optimizers)
        self._prepare()

    def _release(self, parameter: SparseParameter) -> None:
        """Forgets a parameter of a model that is finalized; its optimizers may go on with the dense weight."""
        parameter.become("masked", self._optimizers)
        self.parameters.pop(parameter.name, None)
        for handle in self._gradient_handles.pop(parameter.name)[1]:
            handle.remove()

    def _after_load(self, parameter: SparseParameter) -> None:
        """Follows a parameter whose module loaded a state dict, by copy or by assignment."""
        if self._gradient_handles[parameter.name][0] is not parameter.weight:
            self._watch_gradient(parameter)
        parameter.storage.after_load(self._optimizers)

    # ---- gradients ----

    def _watch_gradient(self, parameter: SparseParameter) -> None:
        weight = parameter.weight
        trainable = weight.requires_grad
        weight.requires_grad_(True)
        handles = [weight.register_post_accumulate_grad_hook(partial(self._after_accumulation, parameter))]
        if self.needs_dense_grad:
            handles.append(weight.register_hook(partial(self._before_accumulation, parameter)))
        weight.requires_grad_(trainable)
        self._gradient_handles[parameter.name] = (weight, handles)

    def _collects_dense_grad(self) -> bool:
        """Whether the optimizer step that comes next may be an update step that wants dense gradients."""
        return self.needs_dense_grad and (not self.autoupdate or self.update_schedule(self.step + 1))

    def _prepare(self) -> None:
        """Asks for the dense gradients that the coming update needs, from storage that has to know before."""
        wanted = self._collects_dense_grad()
        for parameter in self.parameters.values():
            probe = parameter.request_dense_gradient(wanted)
            if probe is not None:
                probe.register_post_accumulate_grad_hook(parameter.after_probe)

    def _before_accumulation(self, parameter: SparseParameter, grad: Tensor) -> None:
        if self._collects_dense_grad():
            parameter.before_accumulation()

    def _after_accumulation(self, parameter: SparseParameter, weight: Tensor) -> None:
        grad = weight.grad
        if grad is None:
            return
        if grad.layout is not torch.strided:
            raise RarefyError(f"{parameter.name} has a sparse gradient; build its module with sparse=False")
        parameter.after_accumulation(grad, self._collects_dense_grad())

    # ---- optimizers ----

    def _follow(self, optimizer: Optimizer) -> None:
        if any(optimizer is other for other in self._optimizers):
            return
        self._optimizers.append(optimizer)
        optimizer.register_step_pre_hook(self._before_step)
        optimizer.register_step_post_hook(self._after_step)
        optimizer.register_state_dict_post_hook(partial(save_entries, self.parameters))
        optimizer.register_load_state_dict_pre_hook(partial(load_entries, self.parameters))
        optimizer.register_load_state_dict_post_hook(self._prune_all)
        self._prune_all(optimizer)
        self._choose_storage()

    def _prune_all(self, optimizer: Optimizer) -> None:
        for parameter in self.parameters.values():
            parameter.prune([optimizer])

    def _before_step(self, *_: Any) -> None:
        """Selects again the gradients that somebody changed after they were accumulated."""
        for parameter in self.parameters.values():
            parameter.storage.select_gradient()

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if skipped_its_step(optimizer):
            return
        for parameter in self.parameters.values():
            if not (preserves_zeros(optimizer) and parameter.storage.gradient_is_selected):
                parameter.prune([optimizer])
        self._count(optimizer)

    def _count(self, optimizer: Optimizer) -> None:
        """Step k is over when every sparse parameter that is trained at all has taken its k-th step."""
        now, ever = trained_by(optimizer), set[nn.Parameter]().union(*map(trained_by, self._optimizers))
        for parameter in self.parameters.values():
            trained = parameter.weight in ever
            parameter.steps = parameter.steps + (parameter.weight in now) if trained else self.step + 1
        involved = [p.steps for p in self.parameters.values() if p.weight in ever]
        if not involved or min(involved) <= self.step:
            return
        self.step += 1
        is_update = self.autoupdate and self.update_schedule(self.step)
        if is_update:
            self.update()
        if is_update or self.step == 1:
            self._choose_storage()
        self._prepare()

    # ---- updates ----

    @abstractmethod
    def update(self) -> None:
        """Recomputes the topology now."""

    def next_update_step(self, after: int) -> int | None:
        """The first update step later than `after`; None if there is none for long."""
        return next_update(self.update_schedule, after)

    def current(self, schedule: Schedule, ahead: int = 0) -> float:
        """The value of a schedule at this step, or `ahead` steps later, clamped to [0, 1]."""
        return min(max(schedule(self.step + ahead, self.updates), 0.0), 1.0)

    def target_at(self, step: int, updates: int) -> float:
        """The sparsity that the schedule asks for at a step, clamped to what the pattern allows."""
        return min(max(self.sparsity(step, updates), 0.0), self.pattern.structure.highest)

    def within_reach(
        self, shares: Mapping[str, float], shapes: Mapping[str, Sequence[int]]
    ) -> dict[str, float]:
        """The sparsity of each weight, lowered where none of its connections would be left."""
        return {
            name: self._patterns[name].within_reach(shapes[name], share) for name, share in shares.items()
        }

    def _targets(self, shapes: Mapping[str, torch.Size]) -> dict[str, float]:
        """The sparsity that each parameter shall have now."""
        self.target_sparsity = self.target_at(self.step, self.updates)
        targets = share_out(self.distribution, self.target_sparsity, shapes)
        for name, target in targets.items():
            for hook in self._target_hooks.values():
                hook(self, name, target)
        return self.within_reach(targets, shapes)

    def _set_mask(self, parameter: SparseParameter, mask: Tensor) -> None:
        before = parameter.mask.clone() if self._topology_hooks else mask
        parameter.set_mask(mask, self._optimizers)
        for hook in self._topology_hooks.values():
            hook(self, parameter.name, before, parameter.mask)
        for computed in self._computed_hooks.values():
            computed(self, parameter.name, parameter.actual_sparsity)

    def register_target_sparsity_hook(self, hook: SparsityHook) -> RemovableHandle:
        """Calls `hook(algorithm, parameter_name, sparsity)` with what the schedule asks for, at updates."""
        return register(self._target_hooks, hook)

    def register_computed_sparsity_hook(self, hook: SparsityHook) -> RemovableHandle:
        """Calls `hook(algorithm, parameter_name, sparsity)` with what was measured, after every update."""
        return register(self._computed_hooks, hook)

    def register_topology_hook(self, hook: TopologyHook) -> RemovableHandle:
        """Calls `hook(algorithm, parameter_name, old_mask, new_mask)` after every update."""
        return register(self._topology_hooks, hook)

    # ---- state ----

    def state_dict(self) -> dict[str, Any]:
        """Everything that evolves, as plain values and tensors; masks are in the model's own state dict."""
        return {
            "algorithm": self.name or type(self).__name__,
            "step": self.step,
            "updates": self.updates,
            "target_sparsity": self.target_sparsity,
            "seed": self.seed,
            **storage_state(self.parameters),
            "dense_gradients": gradient_state(self.parameters),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the caller's mapping stays as it is.

        Raises:
            RarefyError: the state belongs to another algorithm or to other parameters.
        """
        check_state(state, self.name or type(self).__name__, self.parameters)
        self.step, self.updates, self.seed = state["step"], state["updates"], state["seed"]
        self.target_sparsity = state["target_sparsity"]
        if self.compute == "auto":
            restore_storage(self.parameters, state, self._optimizers)
        self._prepare()
        for name, parameter in self.parameters.items():
            parameter.steps = self.step
            parameter.dense_gradient.load(state["dense_gradients"].get(name), parameter.weight.device)
