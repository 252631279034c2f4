"""Pruning layer by layer: what a layer is given comes from pruned layers before it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.distributions import share_out
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.first_masks.by_output import keep_by_output
from rarefy.first_masks.task import Task
from rarefy.pruning.hessians import Hessians, check_linear
from rarefy.pruning.stages import Walk
from rarefy.saliency.inputs import SquareSums, check_watchable
from rarefy.saliency.objective import Loss, called, in_mode
from rarefy.saliency.sparse_gpt import sparse_gpt
from rarefy.saliency.wanda import wanda_scores

BY_LAYER = ("wanda", "sparsegpt")

Progress = Callable[[int, int], None]


def prune_by_layer(
    model: nn.Module,
    algorithm: SparsityAlgorithm,
    chosen: Mapping[str, Candidate],
    method: str,
    data: Sequence[Any],
    loss: Loss | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """Prunes one stage of a model after the other, each measured behind those that are pruned.

    Args:
        model: changed in place.
        algorithm: says how sparse each weight becomes, and of what pattern.
        chosen: the weights, by name.
        method: of `BY_LAYER`.
        data: batches.
        loss: of (model, batch); None where calling the model is enough.
        progress: called with the number of stages that are done, and of all.

    Returns:
        The masks, bool, by name.

    Raises:
        RarefyError: a weight whose inputs cannot be watched, or told apart.
    """
    modules = {name: candidate.places[0].module for name, candidate in chosen.items()}
    _check(method, chosen, modules)
    targets = _targets(algorithm, chosen)
    prune_stage = _sparse_gpt if method == "sparsegpt" else _wanda
    masks: dict[str, Tensor] = {}
    with in_mode(model, False):
        walk = Walk(model, modules, data, loss or called)
        for done, stage in enumerate(walk.stages):
            progress(done, len(walk.stages))
            candidates = {name: chosen[name] for name in stage}
            masks |= prune_stage(model, walk, candidates, algorithm, targets)
        progress(len(walk.stages), len(walk.stages))
    # In the order of the model, which the stages need not have.
    return {name: masks[name] for name in chosen}


def _check(method: str, chosen: Mapping[str, Candidate], modules: Mapping[str, nn.Module]) -> None:
    """Refuses weights whose inputs cannot be measured."""
    for name, candidate in chosen.items():
        check_watchable(name, candidate.places[0], method)
        if len(candidate.places) > 1:
            raise RarefyError(
                f"{method} cannot tell the inputs of {name}, which is tied; leave it out, or take magnitude"
            )
    if method == "sparsegpt":
        check_linear(modules)


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
        masks[name] = keep_by_output(task, name, scores)
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
