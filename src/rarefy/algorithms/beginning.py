"""How an algorithm begins: the masks of step 0, at once or once there is data to measure them on."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rarefy.algorithms.attachment import Attachment
from rarefy.algorithms.attachment.copies import place_of
from rarefy.algorithms.attachment.hooks import UserHooks
from rarefy.distributed import is_cut
from rarefy.distributions import GLOBAL, share_out
from rarefy.errors import ConfigError, RarefyError
from rarefy.first_masks.competition import compete
from rarefy.first_masks.from_data import FromData
from rarefy.first_masks.names import competes_by_weight
from rarefy.first_masks.task import Task, given_batches, refuse_inference
from rarefy.initializers import Initializer, first_mask, generator_for, topk
from rarefy.masks import all_active
from rarefy.patterns import Pattern
from rarefy.roles import Place
from rarefy.saliency.objective import Batches, Loss, Shares, own_loss
from rarefy.schedules import Clamped, Schedule, UpdateSchedule, next_update
from rarefy.storage.parameter import SparseParameter


class Timing:
    """What schedules say, for a class that has a step and a number of updates.

    Attributes:
        clamped: the schedules of which somebody has said that they leave [0, 1].
    """

    updates: int
    clamped: Clamped
    sparsity: Schedule
    pattern: Pattern
    update_schedule: UpdateSchedule

    @property
    @abstractmethod
    def step(self) -> int:
        """How many optimizer steps the sparse weights have taken."""

    def next_update_step(self, after: int) -> int | None:
        """The first update step later than `after`; None if there is none for long."""
        return next_update(self.update_schedule, after)

    def current(self, schedule: Schedule, ahead: int = 0) -> float:
        """The value of a schedule at this step, or `ahead` steps later, clamped to [0, 1]."""
        value = schedule(self.step + ahead, self.updates)
        if not ahead:
            self.clamped.look_at(schedule, value, self.step)
        return min(max(value, 0.0), 1.0)

    def target_at(self, step: int, updates: int) -> float:
        """The sparsity that the schedule asks for at a step, clamped to what the pattern allows."""
        return min(max(self.sparsity(step, updates), 0.0), self.pattern.structure.highest_sparsity)


class Beginning(UserHooks, Timing):
    """What an algorithm does for its first masks.

    Attributes:
        defers: whether first masks that need data wait for `measured`; the Trainer says so, which has data later.
        awaiting: names of the weights that still wait, all connections of which are active until then.
    """

    dynamic: ClassVar[bool]
    defers: bool
    awaiting: set[str]
    init_method: Initializer | FromData
    distribution: str
    seed: int | None
    target_sparsity: float
    _patterns: dict[str, Pattern]
    _attachment: Attachment

    @abstractmethod
    def _set_mask(self, parameter: SparseParameter, mask: Tensor) -> None:
        """Gives a weight a new topology."""

    @property
    def has_known_shares(self) -> bool:
        """Whether `distribution` says what each weight keeps; not where connections of all of them compete."""
        method = self.init_method
        is_competition = isinstance(method, FromData) and method.lets_compete(self._competes_by_weight())
        return self.distribution != GLOBAL and not is_competition

    # Gradients are measured here, and masks outlive the mode in which `apply` was called.
    @torch.inference_mode(False)
    @torch.no_grad()
    def first_masks(self, weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
        """The masks of step 0: by `init_method` if step 0 is an update step, else all True.

        Args:
            weights: dense weights by parameter name.
            places: the module attribute that holds each.
        """
        full = {name: all_active(weight) for name, weight in weights.items()}
        # A schedule that begins later leaves the model dense until then.
        if not self.update_schedule(0) or not weights:
            return full
        # Of what is drawn or spread evenly, nothing says that one weight needs more than another.
        by_size = {name: weight.detach().abs() for name, weight in weights.items()}
        scores = by_size if self.init_method is topk and self.distribution == GLOBAL else {}
        targets = self._targets({name: weight.shape for name, weight in weights.items()}, scores)
        # The first mask is update 0. Not counted up, as weights whose masks a file lacks get theirs by a second
        # call.
        self.updates = max(self.updates, 1)
        if not isinstance(self.init_method, FromData):
            return {name: self._first_mask(name, weights[name], target) for name, target in targets.items()}
        if self.defers:
            self.awaiting |= set(weights)
            return full
        device = next(iter(weights.values())).device
        method = self.init_method
        try:
            batches = given_batches(method.batches, device) if method.looks_at_data else []
        except ConfigError as error:
            raise error.under("init_method") from None
        return self._measure(method, self._task(weights, places, targets, batches))

    @torch.inference_mode(False)
    def measured(
        self, batches: Batches, shares: Shares | None = None, model: nn.Module | None = None
    ) -> dict[str, Tensor]:
        """The masks of the weights that wait for data.

        Args:
            batches: of the training data, on the device of the model, each in parts whose losses add up.
            shares: factors of the losses of parts; None for ones.
            model: a copy of the model with whole weights, where those of the model are cut.
        """
        method = self.init_method
        assert isinstance(method, FromData)
        waiting = {name: one for name, one in self._attachment.parameters.items() if name in self.awaiting}
        weights = {name: one.dense_weight() for name, one in waiting.items()}
        places = {name: one.places[0] for name, one in waiting.items()}
        if model is not None:
            places = {name: Place(*place_of(model, name)) for name in waiting}
        with torch.no_grad():
            targets = self._targets({name: weight.shape for name, weight in weights.items()})
            task = self._task(weights, places, targets, batches, model)
            return self._measure(method, replace(task, shares=shares))

    def begin(self, first: Mapping[str, Tensor]) -> None:
        """Gives weights that waited their first masks, and the storage that these ask for."""
        for name, mask in first.items():
            self._set_mask(self._attachment.parameters[name], mask)
        self.awaiting -= set(first)
        self._began(first)
        self._attachment.choose_storage()

    def found(self, missing: Collection[str]) -> None:
        """Called when a file brought masks: those of all weights but the missing ones, which go on waiting."""
        brought = self.awaiting.difference(missing)
        if brought:
            self.awaiting -= brought
            self._began(brought)
            self._attachment.choose_storage()

    def _began(self, names: Iterable[str]) -> None:
        """Called when weights have their first masks."""

    def _first_mask(self, name: str, weight: Tensor, sparsity: float) -> Tensor:
        assert not isinstance(self.init_method, FromData)
        generator = generator_for(self.seed or 0, name, 0)
        return first_mask(self.init_method, weight.detach(), sparsity, generator, self._patterns[name])

    def _measure(self, method: FromData, task: Task) -> dict[str, Tensor]:
        cut = next((name for name, weight in task.weights.items() if is_cut(weight)), None)
        if cut is not None:
            remedy = (
                "apply the sparsity before fully_shard, with batches of its own, or take init_method: topk"
            )
            raise RarefyError(f"init_method {method.name} cannot measure {cut}, which is sharded; {remedy}")
        refuse_inference(task.model)
        try:
            return method.masks(task)
        # It names its key already; any other error is given the method's name.
        except ConfigError:
            raise
        except RarefyError as error:
            raise RarefyError(_by_first_masks(method.name, str(error))) from error

    def _task(
        self,
        weights: Mapping[str, Tensor],
        places: Mapping[str, Place],
        targets: Mapping[str, float],
        batches: Batches,
        model: nn.Module | None = None,
    ) -> Task:
        loss: Loss = getattr(self.init_method, "loss", None) or own_loss
        return Task(
            model=model or _model_of(weights, places, self._attachment.models()),
            weights=weights,
            places=places,
            patterns=self._patterns,
            targets=targets,
            sparsity=self.target_sparsity,
            seed=self.seed or 0,
            batches=batches,
            loss=loss,
            is_by_weight=self._competes_by_weight(),
        )

    def _competes_by_weight(self) -> bool:
        return competes_by_weight(
            self.init_method,
            dynamic=self.dynamic,
            distribution=self.distribution,
            structure=self.pattern.structure,
        )

    def _targets(
        self, shapes: Mapping[str, torch.Size], scores: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, float]:
        """The sparsity that each parameter shall have now; what competes by `scores` has what it wins."""
        self.clamped.look_at(self.sparsity, self.sparsity(self.step, self.updates), self.step)
        self.target_sparsity = self.target_at(self.step, self.updates)
        targets = share_out(self.distribution, self.target_sparsity, shapes)
        if scores:
            targets |= self._won(scores)
        for name, target in targets.items():
            self._target_hooks(self, name, target)
        return {
            # Only now: hooks hear what the schedule asks for, and masks get what leaves each piece a connection.
            name: self._patterns[name].within_reach(shapes[name], share)
            for name, share in targets.items()
        }

    def _won(self, scores: Mapping[str, Tensor]) -> dict[str, float]:
        """The sparsity of each weight after one competition between the connections of all of them."""
        # Ties are told apart anew at every update, and alike in every process.
        seed = generator_for(self.seed or 0, GLOBAL, self.updates).initial_seed()
        return compete(scores, self._patterns, self.target_sparsity, seed, "distribution: global")

    def shares(self, target: float) -> dict[str, float]:
        """The sparsity of each parameter where that of the network is `target`; with `global` what it has won."""
        if self.distribution == GLOBAL:
            return {
                name: 1.0 - one.active / max(one.shape.numel(), 1)
                for name, one in self._attachment.parameters.items()
            }
        shapes = {name: parameter.shape for name, parameter in self._attachment.parameters.items()}
        return share_out(self.distribution, target, shapes)


def check_competition(distribution: str, *, competes: bool, method: str) -> None:
    """Refuses `global` for an algorithm without a score by which connections of all weights could compete.

    Raises:
        ConfigError: it has none.

    Example:
        >>> check_competition("global", competes=True, method="gmp")
    """
    if distribution == GLOBAL and not competes:
        allowed = f"uniform, er or erk for {method}; connections of all weights compete under gmp and its kin"
        raise ConfigError("distribution", distribution, allowed, "distribution: erk")


def _by_first_masks(method: str, said: str) -> str:
    """What went wrong, with the key of the block that it is about in front."""
    if "init_method" in said:
        return said
    return f"init_method {said}" if said.startswith(method) else f"init_method {method}: {said}"


def _model_of(
    weights: Mapping[str, Tensor], places: Mapping[str, Place], models: Sequence[nn.Module]
) -> nn.Module:
    """The model, of those that an algorithm was applied to, in which the weights have these names."""
    name = next(iter(weights))
    own = [model for model in models if _holds(model, name, places[name])]
    if not own:
        raise RarefyError(f"the model of {name} is gone; keep it until the first masks are measured")
    return own[-1]


def _holds(model: Any, name: str, place: Place) -> bool:
    module_name, _, leaf = name.rpartition(".")
    return leaf == place.leaf and dict(model.named_modules()).get(module_name) is place.module
