"""The object behind the module hooks: it keeps a weight pruned by its mask, in the original and in copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rarefy import masks
from rarefy.errors import RarefyError
from rarefy.filters import Candidate
from rarefy.nn import SparseLinear


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
        self._topology: tuple[int, Any] = (0, None)

    @property
    def is_copy(self) -> bool:
        """Whether this object belongs to a copy of the model that was trained."""
        return self.on_load is None

    def __getstate__(self) -> dict[str, Any]:
        checksum = self.module.topology_checksum() if isinstance(self.module, SparseLinear) else 0
        own = {"module": self.module, "leaf": self.leaf, "_topology": (checksum, None)}
        return {**own, "observe": None, "on_load": None, "on_release": None}

    def prune(self) -> None:
        """Makes inactive weights exact zeros, unless the weight is swapped for another tensor."""
        if isinstance(self.module, SparseLinear):
            return
        weight, mask = getattr(self.module, self.leaf), getattr(self.module, f"{self.leaf}_mask")
        if not isinstance(weight, nn.Parameter):
            return
        if torch.compiler.is_compiling():
            with torch.no_grad():
                weight.masked_fill_(~mask, 0)
        else:
            masks.zero_inactive_(weight.data, mask)

    def before_forward(self, module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Forward pre-hook, called with keyword arguments too."""
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
        elif f"{self.leaf}_mask" in self.module._buffers:
            self.prune()
            delattr(self.module, f"{self.leaf}_mask")


def keepers(module: nn.Module) -> Iterator[KeepPruned]:
    """The objects that keep weights of exactly this module pruned.

    Example:
        >>> list(keepers(nn.Linear(2, 2)))
        []
    """
    for hook in module._forward_pre_hooks.values():
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, KeepPruned):
            yield owner


def release(module: nn.Module, keeper: KeepPruned) -> None:
    """Removes every hook of `keeper` from `module`."""
    for hooks in (
        module._forward_pre_hooks,
        module._state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is keeper]:
            del hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def reclaim(candidate: Candidate) -> None:
    """Takes a weight over from an algorithm that no longer lives, in a copy of its model; the weight becomes dense."""
    for module in dict.fromkeys(place.module for place in candidate.places):
        for stale in [keeper for keeper in keepers(module) if keeper.leaf == candidate.places[0].leaf]:
            release(module, stale)
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
