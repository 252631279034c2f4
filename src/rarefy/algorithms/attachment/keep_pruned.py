"""The object behind the module hooks: it keeps a weight pruned by its mask, in the original and in copies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import masks
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.nn import SparseLinear
from rarefy.torch_private import forward_pre_hooks, remove_hooks

NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})


class KeepPruned:
    """Prunes a weight by the mask beside it.

    In the trained model it acts only after a state dict was loaded, so that a forward pass computes nothing
    more. A copy of the model (deepcopy, pickle, an average of weights) has no algorithm that looks after it;
    there it prunes before every forward pass and every state dict, and where the weight has compact storage it
    refuses values that were averaged over several topologies.

    Args:
        module: holds the weight and its mask.
        leaf: attribute name of the weight.
        observe: called with the inputs that the trained model learns from.
        on_load: called after a state dict was loaded into the trained model.
        on_release: called when the model is finalized.

    Attributes:
        mask_leaf: attribute name of the mask.
        true_weight: the dense weight for state dicts, where forward passes use only a part of it; else None.
    """

    def __init__(
        self,
        module: nn.Module,
        leaf: str,
        observe: Callable[[Tensor], None],
        on_load: Callable[[], None],
        on_release: Callable[[], None],
    ) -> None:
        self.module, self.leaf, self.observe = module, leaf, observe
        self.on_load: Callable[[], None] | None = on_load
        self.on_release: Callable[[], None] | None = on_release
        self.true_weight: Callable[[], Tensor] | None = None
        self.mask_leaf = f"{leaf}_mask"
        self._topology: tuple[int, Any] = (0, None)

    @property
    def is_copy(self) -> bool:
        """Whether this object belongs to a copy of the model that was trained."""
        return self.on_load is None

    def __getstate__(self) -> dict[str, Any]:
        checksum = self.module.topology_checksum() if isinstance(self.module, SparseLinear) else 0
        own = {
            "module": self.module,
            "leaf": self.leaf,
            "mask_leaf": self.mask_leaf,
            "_topology": (checksum, None),
        }
        return {**own, "observe": None, "on_load": None, "on_release": None, "true_weight": None}

    def register(self, modules: Iterable[nn.Module]) -> None:
        """Registers itself with every module that holds the weight."""
        for module in modules:
            module.register_forward_pre_hook(self.before_forward, with_kwargs=True)
            module.register_state_dict_pre_hook(self.before_use)
            module.register_load_state_dict_post_hook(self.after_load)
            if self.true_weight is not None:
                module.register_state_dict_post_hook(StateDictHook(self))

    def prune(self) -> None:
        """Makes inactive weights exact zeros, unless the weight is swapped for another tensor."""
        if isinstance(self.module, SparseLinear):
            return
        weight, mask = getattr(self.module, self.leaf), getattr(self.module, self.mask_leaf)
        if not isinstance(weight, nn.Parameter):
            return
        if torch.compiler.is_compiling():
            with torch.no_grad():
                weight.masked_fill_(~mask, 0)
        else:
            masks.zero_inactive_(weight.data, mask)

    def before_forward(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any] = NO_KEYWORDS
    ) -> None:
        """Forward pre-hook, called with keyword arguments too, but by tools that move hooks to another module."""
        if self.is_copy:
            self.before_use()
        elif module.training and not torch.compiler.is_compiling():
            x = next(iter(inputs or keywords.values()), None)
            if isinstance(x, Tensor):
                self.observe(x)

    def before_use(self, *_: Any) -> None:
        """State-dict pre-hook; in a copy before the forward pass too."""
        if self.is_copy:
            self._check_topology()
            self.prune()

    def _check_topology(self) -> None:
        """Refuses a copy whose indices were overwritten, as an average of weights does at every update."""
        if not isinstance(self.module, SparseLinear) or torch.compiler.is_compiling():
            return
        checksum, version = self._topology
        if version != self.module.topology_version and self.module.topology_checksum() != checksum:
            raise RarefyError(
                "this copy of a sparse layer mixes the values of several topologies, which its compact storage cannot "
                "hold; average the weights of a model whose topology changes with compute: masked"
            )
        self._topology = checksum, self.module.topology_version

    def after_load(self, *_: Any) -> None:
        """Post-hook of `load_state_dict`."""
        self.prune()
        if self.on_load is not None:
            self.on_load()
        elif isinstance(self.module, SparseLinear):
            self._topology = self.module.topology_checksum(), self.module.topology_version

    def release(self) -> None:
        """Makes the weight a plain dense one; once only, where tied modules share this object."""
        if self.on_release is not None:
            self.on_release()
            self.on_release = None
        if isinstance(self.module, SparseLinear):
            self.module.give_back()
        elif self.mask_leaf in dict(self.module.named_buffers(recurse=False, remove_duplicate=False)):
            self.prune()
            delattr(self.module, self.mask_leaf)


class StateDictHook:
    """The hook that a module calls with its state dict; torch marks it by an attribute, which a method cannot have."""

    def __init__(self, keeper: KeepPruned) -> None:
        self.__self__ = keeper

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Puts the true weight in the place of what forward passes use."""
        keeper = self.__self__
        if keeper.true_weight is not None and prefix + keeper.leaf in state:
            state[prefix + keeper.leaf] = keeper.true_weight()


def keepers(module: nn.Module) -> Iterator[KeepPruned]:
    """The objects that keep weights of exactly this module pruned.

    Example:
        >>> list(keepers(nn.Linear(2, 2)))
        []
    """
    for hook in forward_pre_hooks(module).values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, KeepPruned):
            yield owner


def release(module: nn.Module, keeper: KeepPruned) -> None:
    """Removes every hook of `keeper` from `module`."""
    remove_hooks(module, keeper)


def reclaim(candidate: Candidate) -> None:
    """Takes a weight over from an algorithm that no longer lives, in a copy of its model; the weight becomes dense."""
    for module in dict.fromkeys(place.module for place in candidate.places):
        for stale in [keeper for keeper in keepers(module) if keeper.leaf == candidate.places[0].leaf]:
            release(module, stale)
            if stale.mask_leaf in dict(module.named_buffers(recurse=False)):
                delattr(module, stale.mask_leaf)
        if isinstance(module, SparseLinear):
            module.give_back()


def finalize(model: nn.Module) -> nn.Module:
    """Turns a sparse model back into plain dense modules with exact zeros, without a trace of rarefy.

    Args:
        model: any module, sparse or not; changed in place.

    Returns:
        The same module.

    Example:
        >>> import rarefy
        >>> layer = nn.Linear(10, 10)
        >>> rarefy.configure(0.9).apply(layer)
        >>> sorted(finalize(layer).state_dict()), int((layer.weight != 0).sum())
        (['bias', 'weight'], 10)
    """
    for module in model.modules():
        for keeper in list(keepers(module)):
            release(module, keeper)
            keeper.release()
        if isinstance(module, SparseLinear):
            module.give_back()
    return model
