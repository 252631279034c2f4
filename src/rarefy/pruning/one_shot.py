"""`rarefy.prune`: a trained model gets exact zeros, at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.config import configure
from rarefy.distributed import mean_over_ranks
from rarefy.errors import ConfigError, RarefyError, did_you_mean
from rarefy.first_masks.task import given_batches, refuse_inference
from rarefy.masks import sparsity_of
from rarefy.models.call import loss_of
from rarefy.pruning.by_layer import BY_LAYER, Progress, prune_by_layer
from rarefy.pruning.wording import in_words_of_prune
from rarefy.saliency.objective import Loss, Objective, called, in_mode

WITH_GRADIENTS = ("snip", "grasp", "synflow")
METHODS = ("magnitude", "random", *BY_LAYER, *WITH_GRADIENTS)

# A device without float64.
_WIDE = {"mps": torch.float32}


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
    with in_words_of_prune(method):
        masks = _masks(model, block, method, data, loss, progress or _nobody)
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


def _masks(
    model: nn.Module,
    block: Mapping[str, Any],
    method: str,
    data: Sequence[Any],
    loss: Loss | None,
    progress: Progress,
) -> dict[str, Tensor]:
    """The masks of all chosen weights, which have their zeros afterwards."""
    is_by_layer = method in BY_LAYER
    first = {} if is_by_layer else {"init_method": _init_method(method, data, loss)}
    algorithm = _algorithm({**block, **first})
    chosen = algorithm.select(model)
    algorithm.refuse_second_names(model, chosen)
    algorithm.check(chosen)
    if is_by_layer:
        return prune_by_layer(model, algorithm, chosen, method, data, loss, progress)
    # The masks alone: no weight of the model is given to the algorithm.
    masks = algorithm.first_of(chosen)
    with torch.no_grad():
        for name, candidate in chosen.items():
            candidate.parameter.masked_fill_(~masks[name], 0)
    return masks


def _init_method(method: str, data: Sequence[Any], loss: Loss | None) -> Any:
    """The `init_method` that measures a dense model once, as `method` does."""
    if method in WITH_GRADIENTS:
        return {"name": method, "batches": list(data), "loss": loss}
    return "topk" if method == "magnitude" else method


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
