"""`rarefy.prune`: a trained model gets exact zeros, at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.config import configure
from rarefy.distributed import mean_over_ranks
from rarefy.distributions import share_out
from rarefy.errors import ConfigError, RarefyError, did_you_mean
from rarefy.filters import Candidate
from rarefy.first_masks.kinds import Wanda
from rarefy.first_masks.task import Task, given_batches, refuse_inference
from rarefy.masks import sparsity_of
from rarefy.models.call import loss_of
from rarefy.pruning.hessians import Hessians, check_linear
from rarefy.pruning.stages import Walk
from rarefy.pruning.wording import in_words_of_prune
from rarefy.saliency.inputs import SquareSums, check_watchable
from rarefy.saliency.objective import Loss, Objective, called, in_mode
from rarefy.saliency.sparse_gpt import sparse_gpt
from rarefy.saliency.wanda import wanda_scores

BY_LAYER = ("wanda", "sparsegpt")
WITH_GRADIENTS = ("snip", "grasp", "synflow")
METHODS = ("magnitude", "random", *BY_LAYER, *WITH_GRADIENTS)

# A device without float64.
_WIDE = {"mps": torch.float32}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class PrunedWeight:
    """What became of one weight.

    Args:
        name: of the parameter.
        shape: of the weight.
        sparsity: measured, fraction of zeros.
    """

    name: str
    shape: tuple[int, ...]
    sparsity: float


@dataclass(frozen=True)
class Pruned:
    """What pruning a model came to.

    Args:
        weights: those that were pruned, in the order of the model.
        masks: their active connections, bool, by name.
        loss_before: the mean loss over the batches; None where the model returns none, or there are no batches.
        loss_after: the same afterwards.
    """

    weights: Sequence[PrunedWeight]
    masks: Mapping[str, Tensor]
    loss_before: float | None
    loss_after: float | None

    @property
    def sparsity(self) -> float:
        """The measured sparsity of all pruned weights together."""
        size = sum(mask.numel() for mask in self.masks.values())
        return 1.0 - sum(int(mask.sum()) for mask in self.masks.values()) / size if size else 0.0


# In inference mode, where finished models are often used, there would be no gradient to measure by.
@torch.inference_mode(False)
def prune(
    model: nn.Module,
    sparsity: float,
    *,
    method: str = "wanda",
    batches: Any = (),
    loss: Loss | None = None,
    param_filter: str | Sequence[str] | None = None,
    pattern: Any = "unstructured",
    distribution: str = "uniform",
    seed: int = 0,
    progress: Progress | None = None,
) -> Pruned:
    """Prunes a trained model in place, without training.

    `wanda` and `sparsegpt` go through the model layer by layer: what a layer is given comes from pruned layers before
    it. `sparsegpt` also changes the connections that stay, so that each layer's outputs change little. The others prune
    all weights by one measurement. Afterwards modules are plain and dense, with exact zeros; to train on, apply
    `Static(sparsity, init_method="from_zeros")`.

    Args:
        model: any module; changed in place.
        sparsity: fraction of inactive connections of the chosen weights, in [0, 1).
        method: `magnitude`, `random`, `wanda` (arXiv:2306.11695), `sparsegpt` (arXiv:2301.00774), `snip`, `grasp` or
            `synflow`.
        batches: what to measure on, on any device: a list, or a function that returns one. `magnitude` and `random`
            need none, and use them for the losses alone.
        loss: of (model, batch), a scalar; None takes what the model returns. `wanda` and `sparsegpt` need none.
        param_filter: a glob or several; None for the default filter.
        pattern: `unstructured`, `{"n": 2, "m": 4}` or `{"block": [8, 8]}`; `sparsegpt` knows the first two.
        distribution: `uniform`, `er` or `erk`.
        seed: of what is random, and of ties.
        progress: called with the number of stages that are done, and of all.

    Returns:
        What was pruned, and the loss before and after.

    Raises:
        ConfigError: a value that is not allowed.
        RarefyError: batches are missing, a weight cannot be measured, the model is sparse by an algorithm, or made of
            inference tensors.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
        >>> done = prune(model, 0.75, method="wanda", batches=[torch.randn(32, 16)])
        >>> [round(one.sparsity, 2) for one in done.weights], int((model[0].weight == 0).sum())
        ([0.75, 0.75], 96)
    """
    _check_method(method)
    refuse_inference(model)
    block = {"sparsity": sparsity, "pattern": pattern, "distribution": distribution, "seed": seed}
    if param_filter is not None:
        block["param_filter"] = param_filter
    data = _batches(batches, model, needed=method not in ("magnitude", "random"))
    before = _mean_loss(model, data, loss)
    prune_weights = _by_layer if method in BY_LAYER else _at_once
    with in_words_of_prune(method):
        masks = prune_weights(model, block, method, data, loss, progress or _nobody)
    weights = [PrunedWeight(name, tuple(mask.shape), sparsity_of(mask)) for name, mask in masks.items()]
    return Pruned(weights, masks, before, _mean_loss(model, data, loss))


def _check_method(method: str) -> None:
    if method not in METHODS:
        allowed = f"one of {', '.join(METHODS)} ({did_you_mean(str(method), METHODS)})"
        raise ConfigError("method", repr(method), allowed, "method='wanda'")


def _batches(batches: Any, model: nn.Module, *, needed: bool) -> list[Any]:
    first = next(model.parameters(), None)
    device = torch.device("cpu") if first is None else first.device
    try:
        return [parts[0] for parts in given_batches(batches, device)]
    except ConfigError:
        if needed or not (isinstance(batches, Sequence) and not batches):
            raise
        return []


def _nobody(done: int, total: int) -> None:
    pass


def _algorithm(block: Mapping[str, Any]) -> SparsityAlgorithm:
    algorithm = configure({**block, "algorithm": "static", "compute": "masked"}, path="")
    if not isinstance(algorithm, SparsityAlgorithm):
        raise ConfigError("param_filter", "a mapping", "a glob or a list of globs")
    return algorithm


def _at_once(
    model: nn.Module,
    block: Mapping[str, Any],
    method: str,
    data: Sequence[Any],
    loss: Loss | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """Masks by one measurement of the dense model, in one stage; the weights get their zeros."""
    init_method: Any = {"magnitude": "topk", "random": "random"}.get(method)
    if init_method is None:
        init_method = {"name": method, "batches": list(data), "loss": loss}
    algorithm = _algorithm({**block, "init_method": init_method})
    chosen = algorithm.select(model)
    algorithm.check(chosen)
    # The masks alone: no weight of the model is given to the algorithm.
    masks = algorithm.first_of(chosen)
    with torch.no_grad():
        for name, candidate in chosen.items():
            candidate.parameter.masked_fill_(~masks[name], 0)
    return masks


def _by_layer(
    model: nn.Module,
    block: Mapping[str, Any],
    method: str,
    data: Sequence[Any],
    loss: Loss | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """Masks of one stage after the other, each measured behind those that are pruned."""
    algorithm = _algorithm(block)
    chosen = algorithm.select(model)
    algorithm.check(chosen)
    modules = {name: candidate.places[0].module for name, candidate in chosen.items()}
    for name, candidate in chosen.items():
        check_watchable(name, candidate.places[0], method)
        if len(candidate.places) > 1:
            raise RarefyError(
                f"{method} cannot tell the inputs of {name}, which is tied; leave it out, or take magnitude"
            )
    if method == "sparsegpt":
        check_linear(modules)
    targets = _targets(algorithm, chosen)
    masks: dict[str, Tensor] = {}
    with in_mode(model, False):
        walk = Walk(model, modules, data, loss or called)
        for done, stage in enumerate(walk.stages):
            progress(done, len(walk.stages))
            candidates = {name: chosen[name] for name in stage}
            prune_stage = _sparse_gpt if method == "sparsegpt" else _wanda
            masks |= prune_stage(model, walk, candidates, algorithm, targets)
        progress(len(walk.stages), len(walk.stages))
    # In the order of the model, which the stages need not have.
    return {name: masks[name] for name in chosen}


def _targets(algorithm: SparsityAlgorithm, chosen: Mapping[str, Candidate]) -> dict[str, float]:
    """The sparsity of each weight, lowered where it would be left without a connection."""
    shapes = {name: candidate.shape for name, candidate in chosen.items()}
    shares = share_out(algorithm.distribution, algorithm.target_at(0, 0), shapes)
    return {
        name: algorithm.pattern.on(candidate.axes).within_reach(candidate.shape, shares[name])
        for name, candidate in chosen.items()
    }


@torch.no_grad()
def _wanda(
    model: nn.Module,
    walk: Walk,
    stage: Mapping[str, Candidate],
    algorithm: SparsityAlgorithm,
    targets: Mapping[str, float],
) -> dict[str, Tensor]:
    sums = SquareSums("wanda")
    walk.show(list(stage), sums.see)
    task = Task(
        model=model,
        weights={name: one.parameter for name, one in stage.items()},
        places={name: one.places[0] for name, one in stage.items()},
        patterns={name: algorithm.pattern.on(one.axes) for name, one in stage.items()},
        targets=targets,
        # Weights do not compete here: each has its own target.
        sparsity=0.0,
        seed=algorithm.seed or 0,
    )
    masks = {}
    for name, candidate in stage.items():
        scores = wanda_scores(candidate.parameter.detach(), sums.of(name))
        masks[name] = Wanda(batches=()).mask(task, name, scores)
        # At once, so that the layers behind it are measured with it pruned.
        candidate.parameter.masked_fill_(~masks[name], 0)
    return masks


@torch.no_grad()
def _sparse_gpt(
    model: nn.Module,
    walk: Walk,
    stage: Mapping[str, Candidate],
    algorithm: SparsityAlgorithm,
    targets: Mapping[str, float],
) -> dict[str, Tensor]:
    sums = Hessians()
    walk.show(list(stage), sums.see)
    masks = {}
    structure = algorithm.pattern.structure
    for name, candidate in stage.items():
        turned = candidate.axes.transposed
        weight = candidate.parameter.detach()
        # As [out, in], whichever way the module holds it.
        new, mask = sparse_gpt(weight.t() if turned else weight, sums.take(name), targets[name], structure)
        candidate.parameter.copy_(new.t() if turned else new)
        # What rounds to zero in the weight's own format is active all the same.
        masks[name] = (mask.t() if turned else mask).contiguous()
    return masks


def _mean_loss(model: nn.Module, data: Iterable[Any], loss: Loss | None) -> float | None:
    """The mean loss over the batches of all processes; None where nothing tells it."""
    losses = _losses(model, data, loss)
    first = next(model.parameters(), torch.empty(0))
    # Kept apart: processes may have different numbers of batches.
    total = torch.tensor([sum(losses), len(losses)], dtype=_WIDE.get(first.device.type, torch.float64))
    added, count = mean_over_ranks(total.to(first.device)).tolist()
    return added / count if count else None


def _losses(model: nn.Module, data: Iterable[Any], loss: Loss | None) -> list[float]:
    """The losses of this process's batches; none where nothing tells them."""
    objective = Objective(model)
    losses: list[float] = []
    with in_mode(model, False), torch.no_grad():
        for batch in data:
            found = objective.run({}, batch, loss or called)
            try:
                losses.append(float(loss_of(found)))
            except RarefyError:
                # A model without a loss can be pruned as well.
                return []
    return losses
