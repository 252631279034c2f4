"""Several algorithms on one model: for each parameter the first one whose filter matches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rarefy.algorithms.base import Sparsifier, SparsityAlgorithm
from rarefy.algorithms.few_connections import few_connections, warn_of_few
from rarefy.algorithms.hooks import SparsityHook, TopologyHook
from rarefy.errors import RarefyError
from rarefy.filters import Candidate


class Group(Sparsifier):
    """Algorithms in order of precedence; used like one.

    Args:
        algorithms: at least one.

    Raises:
        RarefyError: no algorithm was given.

    Example:
        >>> from rarefy import SET, Static
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        >>> Group([Static(0.3, param_filter="0.*weight"), SET(0.9)]).apply(model)
        >>> [int(layer.weight_mask.sum()) for layer in model]
        [70, 10]
    """

    name: ClassVar[str] = "group"

    def __init__(self, algorithms: Sequence[Sparsifier]) -> None:
        self._algorithms = [leaf for member in algorithms for leaf in member.algorithms]
        if not self._algorithms:
            raise RarefyError("Group([]) is empty; give at least one algorithm")

    @property
    def algorithms(self) -> list[SparsityAlgorithm]:
        """The members in order of precedence, those of inner groups in their place."""
        return self._algorithms

    def apply(self, target: nn.Module | Optimizer) -> None:
        """Makes a model sparse, or follows an optimizer; see `Sparsifier.apply`."""
        if not isinstance(target, nn.Module):
            for algorithm in self.algorithms:
                algorithm.apply(target)
            return
        shares = list(zip(self.algorithms, self._shares(target), strict=True))
        for algorithm, share in shares:
            algorithm.check(share)
        for algorithm, share in shares:
            algorithm.apply_to(share)
        few = {
            name: said
            for algorithm, share in shares
            for name, said in few_connections(algorithm, share).items()
        }
        warn_of_few(target, few, [name for _, share in shares for name in share])

    def _shares(self, model: nn.Module) -> list[dict[str, Candidate]]:
        taken: set[str] = set()
        shares = []
        for algorithm in self.algorithms:
            chosen = algorithm.select(model)
            shares.append({name: candidate for name, candidate in chosen.items() if name not in taken})
            taken |= chosen.keys()
        return shares

    def update(self) -> None:
        """Recomputes every topology now."""
        for algorithm in self.algorithms:
            algorithm.update()

    def register_target_sparsity_hook(self, hook: SparsityHook) -> list[RemovableHandle]:
        """Registers the hook with every member."""
        return [algorithm.register_target_sparsity_hook(hook) for algorithm in self.algorithms]

    def register_computed_sparsity_hook(self, hook: SparsityHook) -> list[RemovableHandle]:
        """Registers the hook with every member."""
        return [algorithm.register_computed_sparsity_hook(hook) for algorithm in self.algorithms]

    def register_topology_hook(self, hook: TopologyHook) -> list[RemovableHandle]:
        """Registers the hook with every member."""
        return [algorithm.register_topology_hook(hook) for algorithm in self.algorithms]

    def state_dict(self) -> list[dict[str, Any]]:
        """One state per algorithm, in order."""
        return [algorithm.state_dict() for algorithm in self.algorithms]

    def load_state_dict(self, state: Sequence[Mapping[str, Any]]) -> None:
        """Goes on from a state.

        Raises:
            RarefyError: the number of states is not the number of algorithms.
        """
        if not isinstance(state, Sequence) or len(state) != len(self.algorithms):
            found = len(state) if isinstance(state, Sequence) else 1
            raise RarefyError(
                f"this sparsity state is of {found} algorithm(s), this group has {len(self.algorithms)}"
            )
        for algorithm, part in zip(self.algorithms, state, strict=True):
            algorithm.load_state_dict(part)
