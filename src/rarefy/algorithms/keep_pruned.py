"""The object behind the module hooks: it keeps a weight pruned by its mask, in the original and in copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from rarefy import masks


class KeepPruned:
    """Prunes a weight by the mask beside it.

    In the trained model it acts only after a state dict was loaded, so that a forward pass computes nothing
    more. A copy of the model (deepcopy, pickle, an average of weights) has no algorithm that looks after it;
    there it prunes before every forward pass and every state dict.

    Args:
        module: holds the weight and its mask.
        leaf: attribute name of the weight.
        on_load: called after a state dict was loaded into the trained model.
        on_release: called when the model is finalized.
    """

    def __init__(
        self, module: nn.Module, leaf: str, on_load: Callable[[], None], on_release: Callable[[], None]
    ) -> None:
        self.module, self.leaf = module, leaf
        self.on_load: Callable[[], None] | None = on_load
        self.on_release: Callable[[], None] | None = on_release

    @property
    def is_copy(self) -> bool:
        """Whether this object belongs to a copy of the model that was trained."""
        return self.on_load is None

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "leaf": self.leaf, "on_load": None, "on_release": None}

    def prune(self) -> None:
        """Makes inactive weights exact zeros, unless the weight is swapped for another tensor."""
        weight, mask = getattr(self.module, self.leaf), getattr(self.module, f"{self.leaf}_mask")
        if not isinstance(weight, nn.Parameter):
            return
        if torch.compiler.is_compiling():
            with torch.no_grad():
                weight.masked_fill_(~mask, 0)
        else:
            masks.zero_inactive_(weight.data, mask)

    def before_use(self, *_: Any) -> None:
        """Forward pre-hook and state-dict pre-hook."""
        if self.is_copy:
            self.prune()

    def after_load(self, *_: Any) -> None:
        """Post-hook of `load_state_dict`."""
        self.prune()
        if self.on_load is not None:
            self.on_load()

    def release(self) -> None:
        """Prunes once more, then takes the mask away; once only, where tied modules share this object."""
        if f"{self.leaf}_mask" not in self.module._buffers:
            return
        self.prune()
        if self.on_release is not None:
            self.on_release()
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
    return model
