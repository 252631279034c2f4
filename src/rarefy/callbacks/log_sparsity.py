"""What sparsity was asked for, what was reached, and how the topology moves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.callbacks.events import Callback
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.storage.parameter import SparseParameter

STATE_KEY = "LogSparsity"


class LogSparsity(Callback):
    """Logs target and actual sparsity on log steps.

    - `sparsity/<common prefix>*/target`: what the schedule asked for at the latest update, per algorithm;
      `sparsity/*/target` for a static one. Where two algorithms share a prefix, the second adds `[2]`.
    - `sparsity/<parameter>/actual`: measured from the mask.
    - `sparsity/<parameter>/grown`: share of its active connections that the latest update replaced; logged
      once per update.
    - `sparsity/model/actual`, `sparsity/model/explored`: over all sparse parameters together, the share of
      inactive connections, and the share of positions that were ever active. The latter needs one byte a
      position, which goes into the checkpoint.
    """

    def __init__(self) -> None:
        self._ever_active: dict[str, Tensor] = {}
        self._grown: dict[str, float] = {}
        self._handles: list[RemovableHandle] = []

    def setup(self, trainer: TrainerView) -> None:
        """Follows every topology update from here on."""
        # The same object may be given to another trainer.
        for handle in self._handles:
            handle.remove()
        self._ever_active = {}
        self._grown = {}
        self._handles = [leaf.register_topology_hook(self._follow) for leaf in algorithms_of(trainer)]

    def on_fit_start(self, trainer: TrainerView) -> None:
        """Counts the connections that are active at the start."""
        for name, parameter in parameters_of(trainer).items():
            mask = parameter.mask
            ever_active = self._ever_active.get(name, mask)
            # `|` makes a tensor of its own, to which updates are added in place.
            self._ever_active[name] = ever_active.to(mask.device) | mask

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Logs on log steps."""
        parameters = parameters_of(trainer)
        if trainer.is_log_step and parameters:
            grown = {f"sparsity/{name}/grown": share for name, share in self._grown.items()}
            explored = {"sparsity/model/explored": self._explored()}
            targets = targets_of(algorithms_of(trainer))
            trainer.log_metrics_dict({**targets, **actual_of(parameters), **grown, **explored})
            self._grown = {}

    def on_save_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Keeps which positions were ever active."""
        state[STATE_KEY] = {"ever_active": dict(self._ever_active)}

    def on_load_checkpoint(self, trainer: TrainerView, state: dict[str, Any]) -> None:
        """Takes back which positions were ever active."""
        if STATE_KEY in state:
            self._ever_active = dict(state[STATE_KEY]["ever_active"])

    def _follow(self, algorithm: SparsityAlgorithm, name: str, old_mask: Tensor, new_mask: Tensor) -> None:
        self._grown[name] = grown_share(old_mask, new_mask)
        if name in self._ever_active:
            self._ever_active[name] |= new_mask

    def _explored(self) -> float:
        positions = sum(mask.numel() for mask in self._ever_active.values())
        return sum(int(mask.count_nonzero()) for mask in self._ever_active.values()) / max(positions, 1)


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
