"""The methods that measure first masks on data, each with its keys, and the one that mixes two that do not."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import KW_ONLY
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import AfterValidator, ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from rarefy.distributed import failing_together
from rarefy.errors import RarefyError
from rarefy.filters import candidates
from rarefy.first_masks.by_output import keep_by_output
from rarefy.first_masks.from_data import FromData, Scope
from rarefy.first_masks.task import Task
from rarefy.initializers import random_scores
from rarefy.patterns.structures import FREE, Structure
from rarefy.saliency.grasp import grasp_scores
from rarefy.saliency.inputs import SquareSums, check_watchable, watched
from rarefy.saliency.mixed import magnitude_mixed
from rarefy.saliency.objective import Objective, in_mode
from rarefy.saliency.outputs import divided_by, hooked, output_layer
from rarefy.saliency.snip import snip_scores
from rarefy.saliency.synflow import SynapticFlow, round_sparsity
from rarefy.saliency.wanda import wanda_scores
from rarefy.ties import TieOrder
from rarefy.validation import Number, worded

_NOISE = 1e-11
_WIDER = "take bfloat16 or float32"
_CONFIG = ConfigDict(extra="forbid")


def _some_batches(value: Any) -> Any:
    """Refuses a number that is no count, and what is no batch either."""
    # True is a whole number to Python.
    if isinstance(value, bool | float | str | None) or (isinstance(value, int) and value < 1):
        raise ValueError
    return value


BatchesOf = Annotated[
    Any,
    AfterValidator(_some_batches),
    Field(
        description="a whole number ≥ 1, how many batches of the training data; in Python also the batches",
        examples=[4],
    ),
]
LossOf = Annotated[Any, Field(description="a function loss(model, batch) that returns a scalar")]
Rows = Annotated[Literal["output", "layer"], Field(description="output or layer", examples=["output"])]
Output = Annotated[str | None, Field(description="the name of a module", examples=["lm_head"])]


@worded
@dataclass(frozen=True, config=_CONFIG)
class Snip(FromData):
    """SNIP (Lee et al., arXiv:1810.02340): connections whose absence would change the loss most.

    score = |w · g|, where g is the mean gradient of the loss over the batches

    Args:
        batches: how many of the training data in a Trainer; else batches, or a function that returns them.
        loss: of (model, batch), a scalar; None takes what the model returns, as the Trainer does.
        scope: `global`, where connections of all weights compete as in the paper, or `layer`. None takes `global`, and
            `layer` where something else already says how many connections each weight has: a distribution other than
            uniform, an algorithm with updates, n of m.

    Example:
        >>> import rarefy
        >>> layer = torch.nn.Linear(8, 1)
        >>> snip = Snip(batches=[torch.ones(2, 8)], loss=lambda model, x: model(x).square().mean())
        >>> rarefy.Static(0.75, init_method=snip).apply(layer)
        >>> int(layer.weight_mask.sum())
        2
    """

    name: ClassVar[str] = "snip"
    batches: BatchesOf
    _: KW_ONLY
    loss: LossOf = None
    scope: Scope = None

    def masks(self, task: Task) -> dict[str, Tensor]:
        """The masks of all weights; see `FromData.masks`."""
        objective = Objective(task.model, task.loss, task.seed, task.shares)
        gradients = objective.gradients(task.weights, task.batches)
        scores = {name: snip_scores(weight, gradients[name]) for name, weight in task.weights.items()}
        return self.chosen(task, scores)


@worded
@dataclass(frozen=True, config=_CONFIG)
class Grasp(FromData):
    """GraSP (Wang et al., arXiv:2002.07376): connections whose absence would make gradients smaller.

    score = w · (Hg), where g and H are gradient and Hessian of the loss of outputs divided by a temperature

    Args:
        batches: as of `Snip`.
        loss: as of `Snip`.
        scope: as of `Snip`.
        temperature: what the model's outputs are divided by before the loss; the paper's is 200.
        output: name of the module whose output they are; None takes the last layer with a weight matrix.

    Weights in float16 are refused: their second derivatives are too small for it.
    """

    name: ClassVar[str] = "grasp"
    batches: BatchesOf
    _: KW_ONLY
    loss: LossOf = None
    scope: Scope = None
    temperature: Annotated[Number, Field(gt=0, description="a number > 0", examples=[200])] = 200.0
    output: Output = None

    def masks(self, task: Task) -> dict[str, Tensor]:
        """The masks of all weights; see `FromData.masks`."""
        half = next((name for name, one in task.weights.items() if one.dtype == torch.float16), None)
        if half is not None:
            # Second derivatives, divided by the temperature twice, are zeros there.
            raise RarefyError(f"grasp needs more range than {half} has, which is float16; {_WIDER}")
        objective = Objective(task.model, task.loss, task.seed, task.shares)
        changes = {}
        # Nothing to divide, so no output layer has to be found.
        if self.temperature != 1.0:
            with failing_together(task.device):
                layer = output_layer(task.model, lambda: _glance(objective, task), self.output)
            changes = {layer: divided_by(self.temperature)}
        with hooked(changes):
            gradients = objective.gradients(task.weights, task.batches)
            products = objective.hessian_products(task.weights, gradients, task.batches)
        scores = {name: grasp_scores(weight, products[name]) for name, weight in task.weights.items()}
        return self.chosen(task, scores)


@worded
@dataclass(frozen=True, config=_CONFIG)
class SynFlow(FromData):
    """SynFlow (Tanaka et al., arXiv:2006.05467): connections that carry most of the flow through positive weights.

    score = θ ⊙ ∂R/∂θ with R = 1ᵀ ∏ |θ| 1, in rounds whose densities fall exponentially; see `SynapticFlow`

    Args:
        batches: as of `Snip`; of the first one only the shapes are used, so 1 is enough.
        loss: as of `Snip`; only what it calls of the model plays a part.
        scope: as of `Snip`.
        rounds: how often connections are scored and dropped; the paper's is 100.
        output: name of the module whose output is summed; None takes the last layer with a weight matrix.
    """

    name: ClassVar[str] = "synflow"
    batches: BatchesOf = 1
    _: KW_ONLY
    loss: LossOf = None
    scope: Scope = None
    rounds: Annotated[int, Field(strict=True, ge=1, description="a whole number ≥ 1", examples=[100])] = 100
    output: Output = None

    def masks(self, task: Task) -> dict[str, Tensor]:
        """The masks of all weights; see `FromData.masks`."""
        objective = Objective(task.model, task.loss, task.seed)
        masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in task.weights.items()}
        # Nothing is exchanged in here: all processes have the same weights, and no data is looked at.
        with failing_together(task.device), in_mode(task.model, False):
            layer = output_layer(task.model, lambda: _glance(objective, task), self.output)
            flow = SynapticFlow(task.model, task.batches[0][0], layer, task.loss)
            for turn in range(1, self.rounds + 1):
                masks = self._round(task, flow, masks, turn)
        return masks

    def _round(
        self, task: Task, flow: SynapticFlow, masks: Mapping[str, Tensor], turn: int
    ) -> dict[str, Tensor]:
        scores = flow.scores({name: weight * masks[name] for name, weight in task.weights.items()})
        # Each layer passes all of the flow on, or its branch's part of it; what is less than that is rounding.
        flows = {name: float(score.abs().sum()) for name, score in scores.items() if score.numel()}
        silent = [name for name, flow in flows.items() if flow <= _NOISE * max(flows.values())]
        if silent:
            remedy = "leave it out of param_filter, or take snip"
            raise RarefyError(f"init_method synflow: nothing flows through {silent[0]}; {remedy}")
        # What was dropped ranks behind all that is active, which may carry no flow either.
        ranked = {name: score.masked_fill(~masks[name], -1.0) for name, score in scores.items()}
        shares = {
            name: task.patterns[name].within_reach(
                task.weights[name].shape, round_sparsity(target, turn, self.rounds)
            )
            for name, target in task.targets.items()
        }
        sparsity = round_sparsity(task.sparsity, turn, self.rounds)
        return self.chosen(_at(task, shares, sparsity), ranked)


@worded
@dataclass(frozen=True, config=_CONFIG)
class Wanda(FromData):
    """Wanda (Sun et al., arXiv:2306.11695): large weights whose inputs are large.

    score = |w| · ‖x‖₂ over all inputs x in the batches; compared within each output

    Of linear layers, Conv1D and convolutions. All weights are measured in the dense model; `rarefy prune` measures each
    layer behind the pruned ones before it.

    Args:
        batches: as of `Snip`.
        loss: as of `Snip`; only what it calls of the model plays a part.
        scope: `output`, where each output keeps as many connections as the others, or `layer`. Where the pattern is one
            of n of m or blocks, its groups or its blocks compete as they always do.
    """

    name: ClassVar[str] = "wanda"
    batches: BatchesOf
    _: KW_ONLY
    loss: LossOf = None
    scope: Rows = "output"

    def masks(self, task: Task) -> dict[str, Tensor]:
        """The masks of all weights; see `FromData.masks`."""
        # A tied weight is multiplied with the inputs of each of its layers.
        places = [(one.name, place) for one in candidates(task.model) for place in one.places]
        places = [(name, place) for name, place in places if name in task.weights]
        for name, place in places:
            check_watchable(name, place, f"init_method {self.name}")
        sums = SquareSums(f"init_method {self.name}")
        objective = Objective(task.model, task.loss, task.seed)
        modules = [(name, place.module) for name, place in places]
        # Sums are exchanged afterwards, for which the others must not wait in vain.
        with failing_together(task.device):
            with in_mode(task.model, False), torch.no_grad(), watched(modules, sums.see):
                for part in itertools.chain.from_iterable(task.batches):
                    objective.run({}, part, task.loss)
            for name in task.weights:
                sums.require(name)
        scores = {name: wanda_scores(weight, sums.of(name)) for name, weight in task.weights.items()}
        if self.scope == "output":
            return {name: keep_by_output(task, name, score) for name, score in scores.items()}
        return {name: task.keep_top(name, score, task.targets[name]) for name, score in scores.items()}


@worded
@dataclass(frozen=True, config=_CONFIG)
class MagnitudeMixed:
    """A share of the connections has the largest magnitudes, the others are drawn at random from the rest.

    With share 1 it is `topk`, with 0 `random`. No data is looked at.

    Args:
        share: of the active connections, in [0, 1].

    Example:
        >>> mask = MagnitudeMixed(share=0.5)(torch.arange(8.0), 0.5, torch.Generator().manual_seed(0))
        >>> int(mask.sum()), mask[6:].tolist()
        (4, [True, True])
    """

    name: ClassVar[str] = "magnitude_mixed"
    share: Annotated[Number, Field(ge=0, le=1, description="a number in [0, 1]", examples=[0.5])] = 0.5

    def __call__(
        self, weight: Tensor, sparsity: float, generator: torch.Generator, structure: Structure = FREE
    ) -> Tensor:
        """The mask of one piece of a weight."""
        noise = random_scores(weight, generator)
        return magnitude_mixed(weight, sparsity, self.share, noise, TieOrder.of(generator), structure)


def _at(task: Task, targets: Mapping[str, float], sparsity: float) -> Task:
    """The same task with other targets."""
    return Task(**{**vars(task), "targets": targets, "sparsity": sparsity})


def _glance(objective: Objective, task: Task) -> Any:
    """One forward pass, to see what is called."""
    with torch.no_grad():
        return objective.run({}, task.batches[0][0], task.loss)
