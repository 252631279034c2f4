"""Several algorithms on one model: for each parameter the first one whose filter matches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rarefy import filters
from rarefy.algorithms.attachment.hooks import SparsityHook, TopologyHook
from rarefy.algorithms.base import Sparsifier, SparsityAlgorithm
from rarefy.algorithms.few_connections import few_connections, warn_of_few
from rarefy.errors import ConfigError, RarefyError
from rarefy.filters import Candidate
from rarefy.validation import shorten

Members: TypeAlias = "Sparsifier | Sequence[Sparsifier] | Mapping[str | tuple[str, ...], Sparsifier]"


class Group(Sparsifier):
    """Algorithms in order of precedence; used like one.

    Args:
        algorithms: at least one by the time it is applied; a mapping gives each a filter (a glob, or several as a
            tuple) in place of its own.

    Raises:
        RarefyError: an empty list or mapping was given, or something that is no algorithm.

    Example:
        >>> from rarefy import SET, Static
        >>> model = nn.Sequential(nn.Linear(10, 10), nn.Linear(10, 10))
        >>> Group([Static(0.3, param_filter="0.*weight"), SET(0.9)]).apply(model)
        >>> [int(layer.weight_mask.sum()) for layer in model]
        [70, 10]
    """

    name: ClassVar[str] = "group"

    def __init__(self, algorithms: Members | None = None) -> None:
        self._algorithms: list[SparsityAlgorithm] = []
        if algorithms is not None:
            self.extend(algorithms)
            if not self._algorithms:
                raise RarefyError("Group([]) is empty; give at least one algorithm")

    def add(self, param_filter: str | Sequence[str], algorithm: Sparsifier) -> None:
        """Adds an algorithm for the parameters of a filter, behind those that are there.

        Args:
            param_filter: a glob or several, in place of the algorithm's own filter.
            algorithm: not applied yet, and no group.

        Raises:
            RarefyError: a group, or an algorithm that was applied.
            ConfigError: a filter that is none.

        Example:
            >>> from rarefy import Static
            >>> group = Group()
            >>> group.add("*.weight", Static(0.5))
            >>> [algorithm.globs for algorithm in group.algorithms]
            [('*.weight',)]
        """
        # One filter cannot stand for the filters of several members.
        if not isinstance(algorithm, SparsityAlgorithm):
            given = type(algorithm).__name__
            raise RarefyError(f"{given} is not allowed for {param_filter!r}; give one algorithm to a filter")
        if algorithm.parameters:
            raise RarefyError(
                f"the algorithm for {param_filter!r} was applied already; give one that was not"
            )
        globs = param_filter if isinstance(param_filter, str) else list(param_filter)
        algorithm.globs = filters.check_filter(globs)
        self._algorithms.append(algorithm)

    def extend(self, algorithms: Members) -> None:
        """Adds several, behind those that are there: another group, a list, or a mapping from filters.

        Raises:
            RarefyError: something else, or in a mapping a group, or an algorithm that was applied.
            ConfigError: a filter that is none.
        """
        if isinstance(algorithms, Mapping):
            for param_filter, algorithm in algorithms.items():
                self.add(param_filter, algorithm)
            return
        members = list(algorithms) if isinstance(algorithms, Iterable) else [algorithms]
        for member in members:
            if not isinstance(member, Sparsifier):
                raise RarefyError(
                    f"{shorten(member)} is not allowed in a Group; give algorithms, or groups of them"
                )
        self._algorithms += [leaf for member in members for leaf in member.algorithms]

    @property
    def algorithms(self) -> list[SparsityAlgorithm]:
        """The members in order of precedence, those of inner groups in their place."""
        return self._algorithms

    def apply(self, target: nn.Module | Optimizer) -> None:
        """Makes a model sparse, or follows an optimizer; see `Sparsifier.apply`."""
        if not self._algorithms:
            raise RarefyError("the group is empty; add at least one algorithm before it is applied")
        if not isinstance(target, nn.Module):
            for algorithm in self.algorithms:
                algorithm.apply(target)
            return
        shares = list(zip(self.algorithms, self._shares(target), strict=True))
        # All of them before any is applied: what is refused leaves the model as it was.
        for algorithm, share in shares:
            algorithm.check(share)
        # First masks of all before any mask is set, so that each is measured in the dense model.
        first = [algorithm.first_of(share) for algorithm, share in shares]
        for (algorithm, share), masks in zip(shares, first, strict=True):
            algorithm.adopt(share, masks)
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
            # From the whole model: a filter that matches nothing is a slip, one whose matches are taken is not.
            chosen = algorithm.select(model)
            shares.append({name: candidate for name, candidate in chosen.items() if name not in taken})
            taken |= chosen.keys()
        self._refuse_divided(model, shares)
        for algorithm in self.algorithms:
            algorithm.refuse_second_names(model, taken)
        return shares

    def _refuse_divided(self, model: nn.Module, shares: Sequence[Mapping[str, Candidate]]) -> None:
        """Refuses a tied weight that an earlier filter takes by one name, and a later one by its first name.

        Raises:
            ConfigError: there is one; it has one mask.
        """
        owner = {name: number for number, share in enumerate(shares) for name in share}
        for name, first in filters.other_names(model):
            for algorithm in self.algorithms[: owner.get(first, 0)]:
                if filters.matches(name, algorithm.globs or ()):
                    globs = ", ".join(algorithm.globs or ())
                    given = f"{globs} ({name} is tied to {first}, which another filter takes)"
                    allowed = f"a filter that matches {first} as well, or neither"
                    path = algorithm.paths.get("param_filter", "")
                    raise ConfigError("param_filter", given, allowed).under(path)

    def track(self, copy: nn.Module) -> None:
        """Lets a copy of the model follow the topology of every member's weights; see `Sparsifier.track`."""
        for algorithm in self.algorithms:
            # A member without weights has nothing to track; if none has any, the first one says what is missing.
            if algorithm.parameters or not any(other.parameters for other in self.algorithms):
                algorithm.track(copy)

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
                f"this sparsity state is of {found} algorithm(s), this group has {len(self.algorithms)}; load it into "
                "a group of the same algorithms"
            )
        for algorithm, part in zip(self.algorithms, state, strict=True):
            algorithm.load_state_dict(part)
