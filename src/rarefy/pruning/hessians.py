"""Sums of products of a layer's inputs, for SparseGPT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from rarefy.distributed import mean_over_ranks, ranks
from rarefy.errors import RarefyError
from rarefy.saliency.inputs import is_linear


class Hessians:
    """Adds up Σ x xᵀ for several linear layers; [in, in] each, float32 or wider.

    Example:
        >>> sums = Hessians()
        >>> sums.see("w", nn.Linear(2, 1), torch.tensor([[1.0, 2.0]]))
        >>> sums.take("w")
        tensor([[1., 2.],
                [2., 4.]])
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Adds an input of a layer."""
        rows = x.reshape(-1, x.shape[-1])
        # In half precision, small terms would vanish in a long sum.
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if name not in self._sums:
            size = rows.shape[1]
            self._sums[name] = torch.zeros(size, size, dtype=rows.dtype, device=rows.device)
        # In place: a second matrix of this size may not fit.
        self._sums[name].addmm_(rows.t(), rows)

    def take(self, name: str) -> Tensor:
        """The sum of a layer over all processes, which is forgotten here.

        Raises:
            RarefyError: the layer was not called, or saw something that is not finite.
        """
        if name not in self._sums:
            raise RarefyError(f"sparsegpt saw no input of {name}; leave it out of the filter, or give others")
        # In place, like the sum itself.
        found = mean_over_ranks(self._sums.pop(name)).mul_(ranks())
        if not bool(found.isfinite().all()):
            raise RarefyError(
                f"sparsegpt saw an input of {name} that is not finite; look at data and weights"
            )
        return found


def check_linear(modules: Mapping[str, nn.Module]) -> None:
    """Refuses layers that are no linear ones.

    Raises:
        RarefyError: one is not.

    Example:
        >>> check_linear({"weight": nn.Linear(2, 2)})
    """
    for name, module in modules.items():
        if not is_linear(module):
            kind = type(module).__name__
            raise RarefyError(
                f"sparsegpt prunes linear layers, and {name} is of a {kind}; leave it out, or take wanda"
            )
