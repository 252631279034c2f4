"""A watch for weights that learn while nothing counts their steps: no topology would ever change, without a word."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping

from torch import Tensor

from rarefy.tensors import SparseWeight
from rarefy.torch_private import times_written

# A gradient scaler may skip as many steps while it looks for its scale.
_PATIENCE = 10
# A critic takes up to 100 steps for each of its generator (Arjovsky et al., 2017), hardly ever so many.
_LONGEST_ABSENCE = 1000


class StepWatch:
    """Counts gradients that come for the first weight that gets some, and says once if no optimizer uses them."""

    def __init__(self) -> None:
        self._name = ""
        self._passes = 0
        self._fresh = 0
        self._version = 0
        self._latest: weakref.ref[object] | None = None
        self._has_told = False

    def saw_gradient(self, name: str, grad: Tensor, has_optimizer: bool, version: int) -> None:
        """Called after each backward pass.

        Args:
            name: of the weight.
            grad: of it; a tensor that was not there before begins a new step, and so does one that was written to since
                the last backward pass, as `zero_grad(set_to_none=False)` does.
            has_optimizer: whether any optimizer is followed.
            version: of `grad` as the backward pass left it, before anything was selected.
        """
        self._name = self._name or name
        if self._has_told or name != self._name:
            return
        self._passes += 1
        is_same = self._latest is not None and self._latest() is _content_of(grad)
        # Accumulation is one write; a further one since is somebody's.
        self._fresh += not is_same or version > self._version + 1
        self._latest = weakref.ref(_content_of(grad))
        self._version = times_written(grad)
        if not has_optimizer and self._passes == 2:
            self._tell(f"{name} has had two backward passes, and no optimizer is followed")
        elif has_optimizer and self._fresh > _PATIENCE:
            self._tell(f"{name} has had {_PATIENCE} gradients since a followed optimizer stepped last")

    def saw_stranger(self, optimizer: str, name: str) -> None:
        """Called after a step of a followed optimizer that has no sparse weight, while none of them gets a gradient."""
        self._tell(
            f"{optimizer} trains none of the sparse weights ({name} …), and they get no gradients: it may train a copy "
            "of the model (deepcopy, prepare_qat without inplace=True), to which sparsity was not applied"
        )

    def saw_step(self) -> None:
        """Called after a step of an optimizer that trains sparse weights."""
        self._fresh = 0

    def _tell(self, what: str) -> None:
        if not self._has_told:
            self._has_told = True
            warnings.warn(
                f"{what}: no step is counted and no topology changes; call sparsity.apply(optimizer) with the one that "
                "trains the model, or sparsity.autoupdate = False for updates by hand",
                stacklevel=2,
            )


class Absence:
    """Notes weights that take no step while others go on, and says so once: their optimizer may be used no longer."""

    def __init__(self) -> None:
        self._taken: dict[str, int] = {}
        # The most that a weight had taken when each of them took its last one.
        self._last: dict[str, int] = {}
        self._absent: set[str] = set()
        self._told: set[str] = set()

    def saw_step(self, has_stepped: Mapping[str, bool]) -> None:
        """Called after each step of an optimizer.

        Args:
            has_stepped: weight → whether the optimizer trains it.
        """
        for name, is_there in has_stepped.items():
            self._taken[name] = self._taken.get(name, 0) + is_there
        most = max(self._taken.values(), default=0)
        for name, is_there in has_stepped.items():
            self._last[name] = most if is_there else self._last.get(name, most)
        self._absent = {name for name in has_stepped if most - self._last[name] >= _LONGEST_ABSENCE}
        if self._absent - self._told:
            self._tell(sorted(self._absent - self._told))
        self._told |= self._absent

    def is_noted(self, name: str) -> bool:
        """Whether a weight does not count any longer, until its optimizer steps again."""
        return name in self._absent

    def state(self) -> dict[str, dict[str, int]]:
        """The counts, to be saved."""
        return {"taken": dict(self._taken), "last": dict(self._last)}

    def load(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on from what `state` returned, or without it from the beginning."""
        self._taken = dict(state.get("taken", {}))
        self._last = dict(state.get("last", {}))
        most = max(self._taken.values(), default=0)
        self._absent = {name for name, last in self._last.items() if most - last >= _LONGEST_ABSENCE}

    @staticmethod
    def _tell(late: list[str]) -> None:
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        warnings.warn(
            f"{late[0]}{more}: no optimizer has trained it for {_LONGEST_ABSENCE} steps of others; it keeps its "
            "topology and the others are counted without it, until its optimizer steps again",
            stacklevel=2,
        )


def _content_of(grad: Tensor) -> object:
    """What a weak reference holds on to: `to_empty` exchanges sparse tensors whole, and no tensor that one knows."""
    return grad._cell if isinstance(grad, SparseWeight) else grad
