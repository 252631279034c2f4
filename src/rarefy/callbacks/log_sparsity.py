"""What sparsity was asked for, what was reached, and how the topology moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.callbacks.events import Callback
from rarefy.callbacks.flops import TrainingFlops
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.roles import OUT_IN, Axes
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.training_cost import memory_of

STATE_KEY = "LogSparsity"


def grown_share(old_mask: Tensor, new_mask: Tensor) -> float:
    """Share of the active connections that were inactive before; 0 where none is active.

    Args:
        old_mask: bool, before the update.
        new_mask: bool, after it.

    Example:
        >>> import torch
        >>> grown_share(torch.tensor([True, True, False]), torch.tensor([True, False, True]))
        0.5
    """
    return int((new_mask & ~old_mask).count_nonzero()) / max(int(new_mask.sum()), 1)


def hamming_distance(old_mask: Tensor, new_mask: Tensor) -> float:
    """Share of the positions that are active in one of two masks alone: their Hamming distance, divided by the size.

    Args:
        old_mask: bool, before the update.
        new_mask: bool, after it.

    Example:
        >>> import torch
        >>> hamming_distance(torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False]))
        0.5
    """
    return int((new_mask ^ old_mask).count_nonzero()) / max(new_mask.numel(), 1)


def dead_shares(mask: Tensor, axes: Axes = OUT_IN) -> tuple[float, float] | None:
    """Shares of the outputs and of the inputs that have no connection; None where they cannot be told apart.

    Args:
        mask: bool, of a weight [out, in, …] or as `axes` says.
        axes: how the module reads the dimensions.

    Example:
        >>> import torch
        >>> dead_shares(torch.tensor([[True, False, False, False], [False, False, False, False]]))
        (0.5, 0.75)
    """
    if mask.dim() < 2 or axes.unknown or not mask.numel():
        return None
    first = _dead(mask)
    # Of a convolution with groups, the second dimension stands for other inputs (or outputs) in each of them.
    pieces = [_dead(piece.transpose(0, 1)) for piece in mask.chunk(axes.groups)]
    second = sum(pieces) / len(pieces)
    return (second, first) if axes.transposed else (first, second)


def _dead(mask: Tensor) -> float:
    """Share of the rows without a connection."""
    return int((~mask.flatten(1).any(1)).count_nonzero()) / len(mask)


class LogSparsity(Callback):
    """Logs target and actual sparsity, how topologies move, and what training has cost, on log steps.

    - `sparsity/<common prefix>*/target`: what the schedule asked for at the latest update, per algorithm;
      `sparsity/*/target` for a static one. Where two algorithms share a prefix, the second adds `[2]`.
    - `sparsity/<parameter>/actual`, `sparsity/model/actual`: measured from the mask, and over all sparse parameters.
    - `sparsity/<parameter>/grown`, `…/hamming`: share of its active connections that the latest update replaced, and
      share of its positions that are active in one of the two topologies alone; logged once per update.
    - `sparsity/<parameter>/dead_outputs`, `…/dead_inputs`: share of them without a connection, once per update.
    - `sparsity/model/explored`: share of all positions that were ever active, which needs one byte a position; that
      goes into the checkpoint.
    - `flops/sparse`, `flops/dense`: operations of training since its beginning; see `TrainingFlops`. Where a
      model under `torch.compile` cannot be counted, a warning says so.
    - `memory/<weights, gradients or states>/sparse`, `…/dense`: bytes, once per update.
    """

    def __init__(self) -> None:
        self._ever_active: dict[str, Tensor] = {}
        self._explored_share = 0.0
        self._news: dict[str, float] = {}
        self._is_updated = False
        # News of a checkpoint that training goes on from, and whether there are more to come.
        self._loaded: tuple[dict[str, float], bool] | None = None
        self._flops = TrainingFlops()
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: TrainerView) -> None:
        """Follows every topology update from here on."""
        # The same object may be given to another trainer.
        for handle in self._handles:
            handle.remove()
        self._ever_active = {}
        self._news = {}
        self._flops = TrainingFlops()
        self._handles = [leaf.register_topology_hook(self._follow) for leaf in algorithms_of(trainer)]

    def on_train_start(self, trainer: TrainerView) -> None:
        """Counts the connections that are active at the start, when first masks from data are there, too."""
        self._flops.begin(trainer)
        goes_on = self._loaded is not None
        # Of an update that came after the last log step: a run that goes on logs what the one before would have.
        self._news, self._is_updated = self._loaded or ({}, True)
        self._loaded = None
        if goes_on:
            self._explored_share = self._explored()
        for name, parameter in parameters_of(trainer).items():
            mask = parameter.mask
            ever_active = self._ever_active.get(name, mask)
            # `|` makes a tensor of its own, to which updates are added in place.
            self._ever_active[name] = ever_active.to(mask.device) | mask
            if not goes_on:
                self._news |= _dead_metrics(name, mask, parameter)

    def on_before_forward(self, trainer: TrainerView, batch: Any) -> None:
        """Counts operations, of a sparse run alone."""
        if algorithms_of(trainer):
            self._flops.before_forward(trainer, batch)

    def on_after_forward(self, trainer: TrainerView, outputs: Any, batch: Any) -> None:
        """Counts them, and those of the backward pass that follows."""
        if algorithms := algorithms_of(trainer):
            self._flops.after_forward(trainer, algorithms, batch)

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Logs on log steps."""
        parameters = parameters_of(trainer)
        if not trainer.is_log_step or not parameters:
            return
        if self._is_updated:
            # Between updates none of it changes.
            self._explored_share = self._explored()
            self._news |= _memory_metrics(trainer, parameters)
            self._is_updated = False
        targets = targets_of(algorithms_of(trainer))
        explored = {"sparsity/model/explored": self._explored_share}
        trainer.log_metrics_dict(
            {**targets, **actual_of(parameters), **self._news, **explored, **self._flops_metrics()}
        )
        self._news = {}

    def on_fit_end(self, trainer: TrainerView) -> None:
        """Stops counting."""
        self._flops.close()

    def on_save_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Keeps which positions were ever active, and the operations so far."""
        state[STATE_KEY] = {
            "ever_active": dict(self._ever_active),
            "flops": self._flops.saved(),
            "news": dict(self._news),
            "is_updated": self._is_updated,
        }

    def on_load_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Takes back which positions were ever active, and the operations so far."""
        saved = state.get(STATE_KEY, {})
        if saved:
            self._ever_active = dict(saved["ever_active"])
        # A checkpoint without news logs everything once more.
        self._loaded = (dict(saved["news"]), bool(saved["is_updated"])) if "news" in saved else None
        self._flops.load(saved.get("flops"))

    def _follow(self, algorithm: SparsityAlgorithm, name: str, old_mask: Tensor, new_mask: Tensor) -> None:
        if name not in self._ever_active:
            # The first mask of a run: there is no topology before it that it could be an update of.
            return
        parameter = algorithm.parameters[name]
        self._news[f"sparsity/{name}/grown"] = grown_share(old_mask, new_mask)
        self._news[f"sparsity/{name}/hamming"] = hamming_distance(old_mask, new_mask)
        self._news |= _dead_metrics(name, new_mask, parameter)
        self._flops.updated(name, new_mask.numel())
        self._is_updated = True
        self._ever_active[name] |= new_mask

    def _flops_metrics(self) -> dict[str, float]:
        total = self._flops.total
        return {"flops/sparse": total.sparse, "flops/dense": total.dense} if total and total.dense else {}

    def _explored(self) -> float:
        positions = sum(mask.numel() for mask in self._ever_active.values())
        return sum(int(mask.count_nonzero()) for mask in self._ever_active.values()) / max(positions, 1)


def _dead_metrics(name: str, mask: Tensor, parameter: SparseParameter) -> dict[str, float]:
    shares = dead_shares(mask, parameter.pattern.axes)
    kinds = ("dead_outputs", "dead_inputs")
    return {f"sparsity/{name}/{kind}": share for kind, share in zip(kinds, shares or (), strict=False)}


def _memory_metrics(trainer: TrainerView, parameters: dict[str, SparseParameter]) -> dict[str, float]:
    optimizers = [] if trainer.optimizer is None else [trainer.optimizer]
    memory = memory_of(trainer.model, optimizers, parameters.values())
    costs = {"weights": memory.weights, "gradients": memory.gradients, "states": memory.states}
    kinds = ("sparse", "dense")
    return {f"memory/{name}/{kind}": getattr(cost, kind) for name, cost in costs.items() for kind in kinds}


def algorithms_of(trainer: TrainerView) -> Sequence[SparsityAlgorithm]:
    """The algorithms of a run that have parameters; none for a dense run."""
    return [leaf for leaf in trainer.sparsity.algorithms if leaf.parameters] if trainer.sparsity else []


def parameters_of(trainer: TrainerView) -> dict[str, SparseParameter]:
    """Every sparse parameter of a run by name."""
    return {name: parameter for leaf in algorithms_of(trainer) for name, parameter in leaf.parameters.items()}


def targets_of(algorithms: Sequence[SparsityAlgorithm]) -> dict[str, float]:
    """The target sparsity of each algorithm by metric name."""
    targets: dict[str, float] = {}
    for leaf in algorithms:
        pattern = f"{common_prefix(list(leaf.parameters))}*" if leaf.dynamic else "*"
        name = f"sparsity/{pattern}/target"
        count = 1
        while name in targets:
            count += 1
            name = f"sparsity/{pattern}[{count}]/target"
        targets[name] = leaf.target_sparsity
    return targets


def common_prefix(names: Sequence[str]) -> str:
    """What all names begin with.

    Example:
        >>> common_prefix(["layers.0.weight", "layers.10.weight"])
        'layers.'
    """
    # In sorted order the first and the last name part earliest.
    first = min(names)
    last = max(names)
    differing = (place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    return first[: next(differing, len(first))]


def actual_of(parameters: dict[str, SparseParameter]) -> dict[str, float]:
    """The measured sparsity of each parameter and of all together by metric name."""
    actual = {name: parameter.actual_sparsity for name, parameter in parameters.items()}
    sizes = {name: parameter.shape.numel() for name, parameter in parameters.items()}
    overall = sum(actual[name] * size for name, size in sizes.items()) / max(sum(sizes.values()), 1)
    named = {f"sparsity/{name}/actual": value for name, value in actual.items()}
    return {**named, "sparsity/model/actual": overall}
