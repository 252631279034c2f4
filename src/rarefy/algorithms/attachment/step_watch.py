"""A watch for weights that learn while no followed optimizer steps: then nothing would ever update, without a word."""

from __future__ import annotations

import warnings
import weakref

from torch import Tensor

from rarefy.torch_private import times_written

# A gradient scaler may skip as many steps while it looks for its scale.
_PATIENCE = 10


class StepWatch:
    """Counts gradients that come for the first weight that gets some, and says once if no optimizer uses them."""

    def __init__(self) -> None:
        self._name = ""
        self._passes = 0
        self._fresh = 0
        self._version = 0
        self._latest: weakref.ref[Tensor] | None = None
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
        is_same = self._latest is not None and self._latest() is grad
        self._fresh += not is_same or version > self._version + 1
        self._latest = weakref.ref(grad)
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
