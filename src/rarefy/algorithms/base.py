"""What every algorithm is: a policy that says when, which and how many connections of a model are active."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Container, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import filters
from rarefy.algorithms import option_checks, options
from rarefy.algorithms.attachment import Attached, Attachment, check_state
from rarefy.algorithms.attachment.hooks import UserHooks
from rarefy.algorithms.beginning import Beginning, check_competition
from rarefy.algorithms.few_connections import few_connections, warn_of_few
from rarefy.algorithms.reparametrization import Reparametrizing
from rarefy.algorithms.summary import Shown
from rarefy.algorithms.view import Needs, StepView, declared_needs, is_replaced, refuse_abstract
from rarefy.distributed import agreed_seed
from rarefy.distributions import check_distribution
from rarefy.errors import ConfigError, RarefyError
from rarefy.filters import Candidate
from rarefy.first_masks.from_data import FromData
from rarefy.first_masks.names import competes_by_weight, parse_first_masks
from rarefy.initializers import refuse_empty
from rarefy.optim.density_scaling import DensityScaling
from rarefy.patterns import Pattern, parse_pattern
from rarefy.schedules import AtSteps, Clamped, Constant, Schedule, UpdateSchedule
from rarefy.storage.choice import COMPACT, HALF, check_compact
from rarefy.storage.growth import GrowthRequest
from rarefy.storage.parameter import SparseParameter

_Algorithm = TypeVar("_Algorithm", bound="SparsityAlgorithm")


class Sparsifier(Shown, ABC):
    """What makes a model sparse: an algorithm, or a group of them, which are used alike."""

    name: ClassVar[str] = ""

    @property
    def label(self) -> str:
        """The registered name, or that of the class."""
        return self.name or type(self).__name__

    @property
    @abstractmethod
    def algorithms(self) -> list[SparsityAlgorithm]:
        """The algorithms behind it, in order of precedence."""

    @abstractmethod
    def apply(self, target: nn.Module | Optimizer) -> None:
        """Makes a model sparse, or follows an optimizer; in either order, and several of each.

        Args:
            target: a module (its chosen weights get masks and exact zeros at once) or an optimizer (topology
                updates run after its steps).

        Raises:
            ConfigError: the filter matches nothing, or the pattern does not divide a weight.
            RarefyError: a parameter already has an algorithm, or `target` is something else.
        """

    def __call__(self, *_: object) -> None:
        """Refuses `model.apply(sparsity)`, which hands over the parts of a model one by one, without their names."""
        raise RarefyError("model.apply(sparsity) is not allowed; call sparsity.apply(model)")

    @abstractmethod
    def track(self, copy: nn.Module) -> None:
        """Lets a copy of the model (an average of weights, a target network) follow its topology at each update.

        The copy's new connections take the model's values, dropped ones go. Call it again after a resume.

        Args:
            copy: a module with the same weights; `AveragedModel` and others that hold it as a part, too.

        Raises:
            RarefyError: the model is not sparse yet, or the copy lacks one of its sparse weights.
        """

    @abstractmethod
    def update(self) -> None:
        """Recomputes the topology now."""

    @property
    def densities(self) -> dict[str, float]:
        """What the learning rate of each weight is to be divided by; empty but for `parametrization: supar`."""
        scalings = [one.scaling for one in self.algorithms if one.scaling is not None]
        return {name: rho for scaling in scalings for name, rho in (scaling.densities or {}).items()}

    @property
    def autoupdate(self) -> bool:
        """Whether updates run by themselves after optimizer steps."""
        return all(algorithm.autoupdate for algorithm in self.algorithms)

    @autoupdate.setter
    def autoupdate(self, value: bool) -> None:
        for algorithm in self.algorithms:
            algorithm.autoupdate = value

    @property
    def accumulates(self) -> bool:
        """Whether several backward passes may come before one optimizer step; False saves RigL memory."""
        return any(algorithm.accumulates for algorithm in self.algorithms)

    @accumulates.setter
    def accumulates(self, value: bool) -> None:
        for algorithm in self.algorithms:
            algorithm.accumulates = value

    @abstractmethod
    def state_dict(self) -> Any:
        """Everything that evolves, as plain values and tensors; masks are in the model's own state dict."""

    @abstractmethod
    def load_state_dict(self, state: Any) -> None:
        """Goes on from a state; the caller's object stays as it is.

        Raises:
            RarefyError: the state belongs to another algorithm or to other parameters.
        """


class SparsityAlgorithm(Attached, Beginning, Reparametrizing, Sparsifier):
    """Decides which connections of a model are active.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        init_method: `random`, `topk`, `from_zeros`, `checkerboard`, a function (weight, sparsity) -> mask, or a mapping
            with the `name` of one that is measured on data, and its keys (`rarefy.first_masks`).
        param_filter: glob or list of globs over parameter names; None for the default filter.
        balance_in_groups: equal counts in this many groups of input features, or None.
        balance_out_groups: equal counts in this many groups of output features, or None.
        distribution: `uniform`, `er`, `erk` or `global`; how the sparsity is shared out among the parameters.
        pattern: `unstructured`, `fan_in`, `fan_out`, `diagonal`, `{n: 2, m: 4}`, `{n: 2, m: 4, transposable: true}` or
            `{block: [8, 8], score: sum}`; what masks look like.
        compute: `auto`, `masked`, `compact` or `{compact: half}`; how the weights are stored.
        parametrization: `standard`, or `supar`, which scales first weights and learning rates by density.
        seed: for everything random; None takes torch's seed when the algorithm is applied.

    Attributes:
        needs: the gradient that an update ranks by: `none`, that of `active` connections, which costs nothing more, or
            the `dense` one.
        competes: whether it has a score for each connection, by which those of all weights can compete (`global`).
        connection_state: numbers of its own that the algorithm keeps for each connection, by name, each with what a new
            connection starts with. They move with the topology, and are part of the state dict.
        accumulates: False promises one backward pass per optimizer step; RigL then saves memory in compact storage.

    Raises:
        ConfigError: a value that is not allowed, with the name of its option.
        RarefyError: a class without the method that makes the masks.
    """

    dynamic: ClassVar[bool] = False
    needs: ClassVar[Needs] = "none"
    needs_dense_grad: ClassVar[bool] = False
    competes: ClassVar[bool] = False
    connection_state: ClassVar[Mapping[str, float]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        # `needs_dense_grad` is the older of the two names; a class may declare either.
        cls.needs = declared_needs(cls)
        cls.needs_dense_grad = cls.needs == "dense"

    def __new__(cls: type[_Algorithm], *_: Any, **__: Any) -> _Algorithm:
        """Refuses a class that lacks the method which makes the masks, in words that say so."""
        refuse_abstract(cls)
        return object.__new__(cls)

    def __init__(
        self,
        sparsity: options.Sparsity,
        *,
        init_method: options.InitMethod = "random",
        param_filter: options.ParamFilter = None,
        balance_in_groups: options.Groups = None,
        balance_out_groups: options.Groups = None,
        distribution: options.Distribution = "uniform",
        pattern: options.PatternForm = "unstructured",
        compute: options.Compute = "auto",
        parametrization: options.Parametrization = "standard",
        seed: options.Seed = None,
    ) -> None:
        self.sparsity: Schedule = option_checks.parse_fraction(sparsity, "sparsity", below_one=True)
        self.init_method = parse_first_masks(init_method)
        self.globs = filters.check_filter(param_filter)
        self.pattern = parse_pattern(pattern, balance_in_groups, balance_out_groups)
        self.distribution = check_distribution(distribution)
        check_competition(self.distribution, competes=self.competes, method=self.label)
        option_checks.check_reach(self.sparsity, self.pattern.structure, self.distribution)
        structure = self.pattern.structure
        competes_by_weight(
            self.init_method, dynamic=self.dynamic, distribution=distribution, structure=structure
        )
        self.compute = option_checks.check_compute(compute)
        self.seed = option_checks.check_seed(seed)
        self.scaling: DensityScaling | None = None
        if parametrization != "standard":
            is_constant = isinstance(self.sparsity, Constant)
            is_measured = isinstance(self.init_method, FromData)
            self.scaling = DensityScaling(parametrization, is_constant=is_constant, is_measured=is_measured)
        # The first mask alone; algorithms that change it set their own.
        self.update_schedule: UpdateSchedule = AtSteps([0])
        # Where each option was written, from `configure`; nowhere, if it was given in Python.
        self.paths: Mapping[str, str] = {}
        self.updates = 0
        self.clamped = Clamped(self.label)
        self.target_sparsity = 0.0
        self.defers = False
        self.awaiting: set[str] = set()
        self._autoupdate = True
        self._accumulates = True
        self._patterns: dict[str, Pattern] = {}
        self._attachment = Attachment(self)
        UserHooks.__init__(self)

    @property
    def algorithms(self) -> list[SparsityAlgorithm]:
        """Itself alone."""
        return [self]

    @property
    def autoupdate(self) -> bool:
        """Whether updates run by themselves after optimizer steps."""
        return self._autoupdate

    @autoupdate.setter
    def autoupdate(self, value: bool) -> None:
        self._autoupdate = value
        self._attachment.prepare()

    @property
    def accumulates(self) -> bool:
        """Whether several backward passes may come before one optimizer step."""
        return self._accumulates

    @accumulates.setter
    def accumulates(self, value: bool) -> None:
        self._accumulates = value

    def apply(self, target: nn.Module | Optimizer) -> None:
        """Makes a model sparse, or follows an optimizer; see `Sparsifier.apply`."""
        if isinstance(target, nn.Module):
            chosen = self.select(target)
            self.refuse_second_names(target, chosen)
            self.apply_to(chosen)
            warn_of_few(target, few_connections(self, chosen), chosen)
        elif isinstance(target, Optimizer):
            if self.scaling is not None:
                with self._named_as_written():
                    self.scaling.check_optimizer(target, {n: p.weight for n, p in self.parameters.items()})
            self._attachment.follow(target)
        else:
            raise RarefyError(f"apply takes a torch module or a torch optimizer, not {type(target).__name__}")

    def select(self, model: nn.Module) -> dict[str, Candidate]:
        """The parameters that this algorithm's filter chooses, by name.

        Raises:
            ConfigError: the filter, or one glob of it, matches nothing.
        """
        # Before the filter looks: it puts the pieces of a model that is cut back in their place.
        self._attachment.belongs_to(model)
        with self._named_as_written():
            return filters.select(model, self.globs)

    def refuse_second_names(self, model: nn.Module, taken: Container[str]) -> None:
        """Refuses a filter that matches a tied weight, though not by its first name, if nobody takes it."""
        with self._named_as_written():
            filters.refuse_second_names(model, self.globs, taken)

    def check(self, chosen: Mapping[str, Candidate]) -> None:
        """Refuses parameters that cannot become sparse, before anything is changed.

        Raises:
            ConfigError: a pattern does not divide a weight, or it cannot have the compact storage that is asked for.
            RarefyError: a parameter already has an algorithm.
        """
        for name, candidate in chosen.items():
            with self._named_as_written():
                pattern = self.pattern.on(candidate.axes)
                pattern.check(name, candidate.shape)
                if self.scaling is not None:
                    self.scaling.check_weight(name, [place.module for place in candidate.places])
                if self.compute in COMPACT:
                    check_compact(candidate, pattern.block, half=self.compute == HALF)
            self._attachment.refuse_taken(name, candidate)

    @contextmanager
    def _named_as_written(self) -> Iterator[None]:
        """Errors of options get the path at which the user wrote them."""
        try:
            yield
        except ConfigError as error:
            option = re.split(r"[.\[]", error.path)[0]
            raise error.under(self.paths.get(option, "")) from None

    def apply_to(self, chosen: Mapping[str, Candidate]) -> None:
        """Makes exactly these parameters, given by name, sparse; a group shares a model out with it.

        Raises:
            ConfigError: the pattern does not divide a weight.
            RarefyError: a parameter already has an algorithm.
        """
        # All checks before any weight is touched: what is refused leaves the model as it was.
        self.check(chosen)
        self.adopt(chosen, self.first_of(chosen))

    def first_of(self, chosen: Mapping[str, Candidate]) -> dict[str, Tensor]:
        """The first masks of parameters that were checked, while all of the model is still dense."""
        # One for all processes, whose masks would differ otherwise.
        if self.seed is None:
            self.seed = agreed_seed(torch.initial_seed())
        self._attachment.reclaim(chosen)
        self._patterns |= {name: self.pattern.on(candidate.axes) for name, candidate in chosen.items()}
        weights = {name: candidate.parameter for name, candidate in chosen.items()}
        with self._named_as_written():
            return self.first_masks(weights, {name: one.places[0] for name, one in chosen.items()})

    def adopt(self, chosen: Mapping[str, Candidate], first: Mapping[str, Tensor]) -> None:
        """Makes parameters that were checked sparse, by their first masks."""
        if self.scaling is not None:
            self.scaling.scale({name: candidate.parameter for name, candidate in chosen.items()}, first)
        for name, candidate in chosen.items():
            self._set_mask(self._attachment.adopt(candidate, self.pattern), first[name])
        self._attachment.adopted()
        if not self.awaiting:
            self._began(chosen)

    @abstractmethod
    def update(self) -> None:
        """Recomputes the topology now."""

    def observe(self, view: StepView) -> None:
        """Called before each optimizer step for each weight that it changes, where a class overrides it.

        Args:
            view: the weight, its gradient and the algorithm's `connection_state`, one entry a connection.
        """

    @property
    def observes(self) -> bool:
        """Whether `observe` does anything."""
        return is_replaced(self, SparsityAlgorithm, "observe")

    @property
    def restricts_forward(self) -> bool:
        """Whether forward passes may use fewer connections than are active."""
        return False

    def gradient_request(self) -> GrowthRequest | None:
        """Which part of the dense gradient the coming update can need; None for all of it."""
        return None

    def _set_mask(self, parameter: SparseParameter, mask: Tensor) -> None:
        refuse_empty(parameter.name, mask, self.step, self.target_sparsity)
        # Masked storage writes the new mask over the old one; the copy is made only where somebody listens.
        before = parameter.mask.clone() if self._topology_hooks else mask
        self._attachment.set_mask(parameter, mask)
        if self._topology_hooks:
            self._topology_hooks(self, parameter.name, before, parameter.mask)
        if self._computed_hooks:
            self._computed_hooks(self, parameter.name, parameter.actual_sparsity)

    def state_dict(self) -> dict[str, Any]:
        """Everything that evolves, as plain values and tensors; masks are in the model's own state dict."""
        return {
            "algorithm": self.label,
            "step": self.step,
            "updates": self.updates,
            "target_sparsity": self.target_sparsity,
            "seed": self.seed,
            **({"awaiting": sorted(self.awaiting)} if self.awaiting else {}),
            **({} if self.scaling is None else self.scaling.state_dict()),
            **self._attachment.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the caller's mapping stays as it is.

        Raises:
            RarefyError: the state belongs to another algorithm or to other parameters.
        """
        # Before anything of it is taken.
        check_state(state, self.label, self.parameters)
        self.updates = state["updates"]
        self.seed = state["seed"]
        self.target_sparsity = state["target_sparsity"]
        self.awaiting = set(state.get("awaiting", ()))
        self._attachment.load_state_dict(state)
