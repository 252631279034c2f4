"""Weights of which forward passes use a part: what other code must not meet in them, and must not write to."""

from __future__ import annotations

import torch
from torch import Tensor

from rarefy.algorithms.attachment.keeper import Keeper
from rarefy.distributed import is_cut
from rarefy.errors import RarefyError
from rarefy.storage.parameter import SparseParameter
from rarefy.torch_private import times_written

_WHOLE_NUMBERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ForwardUse:
    """Sees to it that forward passes use the part that they shall, and that nobody writes to a copy in vain.

    A state dict has the values that the optimizer trains, which the weight does not hold between steps; so what is in
    it is a copy. Whoever writes to a state dict expects to write to the model.

    Args:
        parameter: the weight.
    """

    def __init__(self, parameter: SparseParameter) -> None:
        self._parameter = parameter
        # Held until the next step, so that it can be compared.
        self._given: Tensor | None = None
        self._known = (0, 0)

    def watch(self, use: Keeper) -> None:
        """Is called before forward passes, and for state dicts, from now on."""
        others = use.on_forward

        def settle() -> None:
            if others is not None:
                others()
            # A step that raised an error has left all values in place. With other weights in the module
            # (`functional_call`) there is nothing to take out of them.
            if not self._parameter.forward.is_hiding and self._parameter.is_in_place:
                self._parameter.hide()
            use.is_in_step = False
            self.check()

        use.on_forward = settle
        use.true_weight = self.saved_weight

    def saved_weight(self) -> Tensor:
        """The weight for a state dict."""
        weight = self._parameter.saved_weight()
        if not is_cut(weight):
            self._given = weight
            self._known = _content(weight)
        return weight

    def check(self) -> None:
        """Refuses to go on where somebody wrote to what a state dict was given.

        Raises:
            RarefyError: somebody did.
        """
        given = self._given
        if given is None or _content(given) == self._known:
            return
        self.forget()
        raise RarefyError(
            f"{self._parameter.name} of a state dict was written to, which does not reach the model: forward passes "
            "use a part of this weight, so its state dict has a copy; hand what was written to load_state_dict, or "
            "write to the parameter"
        )

    def forget(self) -> None:
        """Called when what a state dict was given is of no account any longer."""
        self._given = None


def _content(tensor: Tensor) -> tuple[int, int]:
    """Another one after a write: by torch, which counts, or past it (`.data`), which changes the sum of the bits."""
    bits = tensor.contiguous().view(_WHOLE_NUMBERS[tensor.element_size()])
    return times_written(tensor), int(bits.sum(dtype=torch.int64))
