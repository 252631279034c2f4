"""Algorithms whose topology changes while the model trains."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.option_checks import refuse_step_keys
from rarefy.algorithms.options import Sparsity, Update
from rarefy.algorithms.view import Numbers, WeightView, arguments_of, call_update_mask, is_replaced
from rarefy.distributed import differing, mean_over_ranks, ranks
from rarefy.distributions import GLOBAL
from rarefy.errors import ConfigError, RarefyError
from rarefy.initializers import check_mask, check_scores, generator_for
from rarefy.patterns.structures import FREE
from rarefy.schedules import parse_update_schedule, update_steps
from rarefy.storage.gradients import Shortlist
from rarefy.storage.parameter import SparseParameter
from rarefy.ties import TieOrder


class DynamicSparsityAlgorithm(SparsityAlgorithm):
    """A base for algorithms of one's own: implement `update_mask`.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        update: update schedule, `{freq, start, stop}`, `{steps: [...]}` or a function; None for every step.
        **options: the options of `SparsityAlgorithm`.

    Attributes:
        generator: a CPU generator, fresh for every parameter and update; the source of all randomness.
        by_pieces: whether each connection is ranked by its own entries and chosen by `keep_top` or `drop_and_grow`, so
            that `update_mask` may be given DTensors of an unstructured weight that `fully_shard` cut; else such a
            weight is gathered for it. A subclass says so for itself.
        only_rises: why its sparsity must not fall; empty where it may.

    Raises:
        RarefyError: `update_mask` takes other arguments than a view, or those of the older forms.

    Example:
        >>> class KeepLarge(DynamicSparsityAlgorithm):
        ...     '''Keeps the largest weights.'''
        ...     def update_mask(self, view):
        ...         return self.keep_top(view.weight.abs(), view.sparsity)
        >>> layer = torch.nn.Linear(10, 10)
        >>> KeepLarge(0.9).apply(layer)
        >>> int(layer.weight_mask.sum())
        10
    """

    dynamic: ClassVar[bool] = True
    by_pieces: ClassVar[bool] = False
    only_rises: ClassVar[str] = ""

    def __new__(cls, *_: Any, **options: Any) -> DynamicSparsityAlgorithm:
        """Refuses what belongs inside `update`; Python would only say that the keyword is unexpected."""
        refuse_step_keys(cls, options)
        return super().__new__(cls)

    def __init__(self, sparsity: Sparsity, *, update: Update = None, **options: Any) -> None:
        super().__init__(sparsity, **options)
        arguments_of(self.update_mask)
        self.update_schedule = parse_update_schedule(update)
        if self.scaling is not None:
            is_first_step = self.update_schedule(0)
            self.scaling.check_start(is_first_step=is_first_step, restricts_forward=self.restricts_forward)
        self.generator = torch.Generator()
        self._has_told = False

    def check_run(self, steps: int) -> None:
        """Refuses a sparsity that falls within a run: a list that begins anew, a cosine that turns round.

        Args:
            steps: optimizer steps of the run.

        Raises:
            ConfigError: it falls at an update step, and the class cannot have that.
        """
        highest = 0.0
        for number, step in enumerate(
            update_steps(self.update_schedule, 0, steps) if self.only_rises else ()
        ):
            target = self.target_at(step, number)
            # Formulas that have reached their end may still differ in the last digit.
            if target < highest - 1e-9:
                given = f"a schedule that falls to {target:g} at step {step}"
                allowed = f"one that rises up to step {steps}, or end its updates before by update.stop: "
                with self._named_as_written():
                    raise ConfigError("sparsity", given, f"{allowed}{self.only_rises} under {self.name}")
            highest = max(highest, target)

    @abstractmethod
    def update_mask(self, view: WeightView) -> Tensor:
        """The new mask of one weight, or of one of its balanced groups.

        Subclasses may as well take (weight, mask, sparsity, dense_grad), or (weight, mask, sparsity).

        Args:
            view: the weight, its mask, the target, and what the class asked for.

        Returns:
            Bool tensor of the shape of the weight.
        """

    def forward_mask(self, view: WeightView) -> Tensor | None:
        """The connections that forward passes use until the next update, where they are fewer than the active ones.

        The others count as zeros in forward passes; they get gradients, and the optimizer trains them.

        Args:
            view: as `update_mask` gets it, with the new mask; without gradient.

        Returns:
            Bool tensor of the shape of the weight, no connection of which is inactive; None for all active ones.
        """
        return None

    @property
    def restricts_forward(self) -> bool:
        """Whether `forward_mask` does anything."""
        return is_replaced(self, DynamicSparsityAlgorithm, "forward_mask")

    def keep_top(self, scores: Tensor, sparsity: float) -> Tensor:
        """The mask of the highest scores at a sparsity, which obeys the `pattern` of this algorithm.

        Equal scores are told apart by an order that belongs to the seed, the parameter and the update. Where rounding
        would leave nothing, one connection (or block, or one of each group of m) stays, unless the sparsity is 1.

        Args:
            scores: the shape of the weight that `update_mask` was given; higher = keep.
            sparsity: fraction of inactive connections, in [0, 1].

        Returns:
            Bool tensor of the shape of `scores`.
        """
        structure = self.pattern.structure
        reached = structure.within_reach(scores.shape, sparsity)
        return structure.keep_top(scores, reached, TieOrder.of(self.generator))

    def _began(self, names: Iterable[str]) -> None:
        """Asks for the forward masks of first topologies."""
        if self.restricts_forward and self.update_schedule(0):
            targets = self.shares(self.target_sparsity)
            for name in names:
                self._restrict_forward(self.parameters[name], targets[name], 0)

    @torch.no_grad()
    def update(self) -> None:
        """Recomputes the topology of every parameter now.

        Raises:
            RarefyError: a backward pass left the dense gradient out that the algorithm ranks by.
        """
        # Before anything is exchanged whose size follows from the masks.
        self._refuse_diverged()
        shapes = {name: parameter.shape for name, parameter in self.parameters.items()}
        # All targets first: under a global distribution they come from the scores of all weights before any
        # changes.
        targets = self._targets(shapes, self._competing())
        # A list and not a generator: every weight is updated, whatever the first ones answer.
        changes = [
            self._update_parameter(parameter, targets[name]) for name, parameter in self.parameters.items()
        ]
        # Where no weight could be updated, a cycling schedule stays where it is.
        self.updates += any(changes)
        self._refuse_diverged()

    def _competing(self) -> dict[str, Tensor]:
        """The scores of all connections of weights that learn, where those of all weights compete."""
        if self.distribution != GLOBAL:
            return {}
        found = {}
        for name, parameter in self.parameters.items():
            if not self._attachment.is_frozen(parameter):
                # What they win is not known yet, so the view has no target.
                views = self._views(parameter, 0.0, None, parameter.dense_state())
                found[name] = parameter.pattern.merge([self._scored(view) for view in views])
        return found

    def score(self, view: WeightView) -> Tensor:
        """Ranks the connections of a weight; needed for `distribution: global` alone.

        Args:
            view: as `update_mask` gets it, without gradient.

        Returns:
            Scores of the shape of the weight; higher = keep.
        """
        raise NotImplementedError

    def _scored(self, view: WeightView) -> Tensor:
        source = f"{type(self).__name__}.score"
        with view.left_alone(source):
            scores = self.score(view)
        return check_scores(scores, view.weight, source)

    def _refuse_diverged(self) -> None:
        """Refuses masks that differ between processes: gradients would be averages over different models."""
        if ranks() == 1:
            return
        sums = {name: parameter.storage.fingerprint for name, parameter in self.parameters.items()}
        # Where the weights are, as NCCL exchanges nothing that is on the CPU.
        device = next(iter(self.parameters.values())).weight.device
        diverged = differing(sums, device)
        if diverged:
            names = ", ".join(diverged[:3]) + (f" and {len(diverged) - 3} more" if len(diverged) > 3 else "")
            raise RarefyError(
                f"the processes have different masks of {names} at the update of step {self.step}, because their "
                "weights or gradients differ; wrap the model in DistributedDataParallel, give every process the same "
                "seed and initial weights, or destroy the process group if they train different models"
            )

    def _update_parameter(self, parameter: SparseParameter, sparsity: float) -> bool:
        """Updates one weight, unless it is frozen or what the algorithm needs is missing; whether it did."""
        if self._attachment.is_frozen(parameter):
            return False
        # Between steps the weight may hold zeros where forward passes are not to use it.
        parameter.show()
        # Anew for each weight, so that its mask does not depend on how many came before.
        self.generator = generator_for(self.seed or 0, parameter.name, self.updates)
        mask = self._next_mask(parameter, sparsity)
        if mask is not None:
            self._set_mask(parameter, mask)
            if self.restricts_forward:
                # Compact storage would have to build it; but a hook may have given the weight another one.
                known = None if self._topology_hooks or self._computed_hooks else mask
                self._restrict_forward(parameter, sparsity, self.updates, known)
        parameter.hide()
        if mask is None:
            self._tell_missing(parameter)
        return mask is not None

    def _tell_missing(self, parameter: SparseParameter) -> None:
        """Says once that an update could not have the gradient that it ranks by."""
        if not self._has_told:
            self._has_told = True
            warnings.warn(
                f"{parameter.name} keeps its topology at step {self.step}: {self.label} ranks by its {self.needs} "
                "gradient, and no backward pass left one for this step (the weight was not used, the update was called "
                "before a backward pass, or compact storage was given a gradient by hand); this is said once",
                stacklevel=2,
            )

    def _next_mask(self, parameter: SparseParameter, sparsity: float) -> Tensor | None:
        """The new mask of a parameter, by `update_mask`; None where the gradient for it is missing."""
        gradient = self._gradient(parameter)
        if self.needs != "none" and gradient is None:
            return None
        if isinstance(gradient, Shortlist):
            gradient = gradient.dense(parameter.shape)
        # In dense form, which the pattern can cut; the storage takes it back below.
        state = parameter.dense_state()
        views = self._views(parameter, sparsity, gradient, state)
        pieces = [self._asked(view) for view in views]
        # Pieces of the state are views of it, so what `update_mask` wrote is there.
        parameter.store_state(state)
        return parameter.pattern.merge(pieces)

    def _takes_pieces(self, parameter: SparseParameter) -> bool:
        """Whether `update_mask` is given the weight as it is cut."""
        # A subclass may have replaced what its base said this of.
        is_own = "by_pieces" in vars(type(self)) and self.by_pieces and "update_mask" not in vars(self)
        pattern = parameter.pattern
        return is_own and parameter.is_sharded and pattern.axis is None and pattern.structure == FREE

    def _views(
        self,
        parameter: SparseParameter,
        sparsity: float,
        gradient: Tensor | None,
        state: Mapping[str, Tensor],
        mask: Tensor | None = None,
    ) -> Sequence[WeightView]:
        """One view for each balanced group; `mask` is that of the parameter, where it is at hand."""
        split = parameter.pattern.split
        takes_pieces = self._takes_pieces(parameter)
        # Through `.data`: writes to what is shown are counted apart from those to the module's own tensors.
        weights = split((parameter.weight if takes_pieces else parameter.dense_weight()).data)
        if mask is None:
            mask = parameter.mask_in_pieces if takes_pieces else parameter.mask
        old_masks = split(mask.data)
        gradients = [None] * len(weights) if gradient is None else split(gradient)
        states = {name: split(numbers) for name, numbers in state.items()}
        facts = (sparsity, self.step, self.generator)
        own = [Numbers({name: states[name][index] for name in states}) for index in range(len(weights))]
        return [
            WeightView(parameter.name, weight, mask, *facts, grad, numbers)
            for weight, mask, grad, numbers in zip(weights, old_masks, gradients, own, strict=True)
        ]

    def _asked(self, view: WeightView) -> Tensor:
        """What `update_mask` returns, if it is a mask that obeys the pattern."""
        source = f"{type(self).__name__}.update_mask"
        advice = "choose with self.keep_top(scores, sparsity)"
        with view.left_alone(source):
            mask = call_update_mask(self.update_mask, view)
        mask = check_mask(mask, view.weight, source)
        return self.pattern.structure.require(mask, view.sparsity, source, advice)

    def _restrict_forward(
        self, parameter: SparseParameter, sparsity: float, update: int, mask: Tensor | None = None
    ) -> None:
        """Asks for the forward mask of a topology that has just begun; `mask` as of `_views`."""
        self.generator = generator_for(self.seed or 0, parameter.name, update)
        source = f"{type(self).__name__}.forward_mask"
        pieces = []
        for view in self._views(parameter, sparsity, None, parameter.dense_state(), mask):
            with view.left_alone(source):
                piece = self.forward_mask(view)
            pieces.append(view.mask if piece is None else check_mask(piece, view.weight, source))
        if not parameter.set_forward_mask(parameter.pattern.merge(pieces)):
            raise RarefyError(f"{source} returned inactive connections; return a part of view.mask")

    def _gradient(self, parameter: SparseParameter) -> Tensor | Shortlist | None:
        """The gradient that the algorithm asked for; None without one (a frozen weight keeps its topology)."""
        if self.needs == "active":
            return parameter.take_active_gradient(in_pieces=self._takes_pieces(parameter))
        return self._dense_gradient(parameter) if self.needs == "dense" else None

    def _dense_gradient(self, parameter: SparseParameter) -> Tensor | Shortlist | None:
        """The mean dense gradient of this step; a shortlist of it is only made in a single process.

        Raises:
            RarefyError: a backward pass left it out.
        """
        value = self._own_dense_gradient(parameter)
        if isinstance(value, Tensor) and not parameter.is_sharded:
            return mean_over_ranks(value, self.traffic)
        return value

    def _own_dense_gradient(self, parameter: SparseParameter) -> Tensor | Shortlist | None:
        """What this process has for the mean of all; of a weight in pieces the mean itself."""
        if parameter.dense_gradient.is_missing:
            raise RarefyError(
                f"{parameter.name} has a gradient but no dense gradient, by which {self.label} "
                f"updates at step {self.step}: in compact storage loss.backward(inputs=...) leaves it out, and so "
                "does a penalty on weights with a backward pass of its own; call loss.backward() without inputs, add "
                "the penalty to the loss, or set compute: masked"
            )
        value = parameter.dense_gradient.take()
        if parameter.is_sharded:
            # Its pieces are means over all processes already.
            is_whole = value is None or self._takes_pieces(parameter)
            return value if is_whole else parameter.storage.spread(cast(Tensor, value))
        # The others wait for this process in the average, though its batch did not use the weight.
        if value is None and ranks() > 1:
            value = torch.zeros_like(parameter.dense_weight())
        return value
