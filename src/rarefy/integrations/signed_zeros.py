"""Masks that travel inside dense weights: an inactive connection is saved as +0, an active one that is zero as −0.

Both are equal to zero wherever the weights are loaded, so the file is that of an ordinary dense model; and the mask is
known as soon as the weights are loaded again, before anything is pruned by an older one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.checkpoint.mask_names import mask_names
from rarefy.distributed import Cut, is_cut, local_part


def carry_masks(model: nn.Module, names: Sequence[str], leaves_out: bool = False) -> set[str]:
    """Lets the weights of a model's state dicts carry its masks: those it gives, and those without masks it takes.

    Args:
        model: sparse already.
        names: its sparse parameters.
        leaves_out: whether the state dicts that it gives have no masks beside the weights.

    Returns:
        Those of the parameters whose weights, and with them their masks, were loaded since; it grows with each load.

    Example:
        >>> import rarefy
        >>> layer, other = nn.Linear(10, 10), nn.Linear(10, 10)
        >>> for one in (layer, other):
        ...     rarefy.configure(0.9).apply(one)
        ...     taken = carry_masks(one, ["weight"])
        >>> state = layer.state_dict()
        >>> del state["weight_mask"]
        >>> other.load_state_dict(state), torch.equal(other.weight_mask, layer.weight_mask), taken
        (<All keys matched successfully>, True, {'weight'})
    """
    taken: set[str] = set()
    parameters = dict(model.named_parameters(remove_duplicate=False))
    of_all = mask_names({**parameters, **_buffers(model)})
    masks = {name: of_all[name] for name in names}
    model.register_state_dict_post_hook(partial(_write, masks, leaves_out))
    model.register_load_state_dict_pre_hook(partial(_read, masks, taken))
    return taken


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_buffers(remove_duplicate=False))


def _write(
    masks: Mapping[str, str], leaves_out: bool, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    """Leaves variables alone (`keep_vars`), which are for computing and not for saving."""
    for name, mask_name in masks.items():
        weight = state.get(prefix + name)
        mask = state.get(prefix + mask_name)
        if weight is not None and mask is not None and not weight.requires_grad:
            state[prefix + name] = with_signed_zeros(weight, mask)
            if leaves_out:
                del state[prefix + mask_name]


def _read(
    masks: Mapping[str, str], taken: set[str], module: nn.Module, state: dict[str, Any], prefix: str, *_: Any
) -> None:
    own = _buffers(module)
    for name, mask_name in masks.items():
        weight = state.get(prefix + name)
        # A model that was finalized since has no mask to be loaded.
        if weight is not None and mask_name in own:
            # A state dict with masks of its own means those.
            state.setdefault(prefix + mask_name, active_connections(weight))
            taken.add(name)


def with_signed_zeros(weight: Tensor, mask: Tensor) -> Tensor:
    """The weight itself if its zeros have the right signs: − at active connections, + at inactive ones; else a copy.

    Example:
        >>> with_signed_zeros(torch.tensor([0.0, 0.0, 5.0]), torch.tensor([True, False, True]))
        tensor([-0., 0., 5.])
    """
    if is_cut(weight):
        return Cut.of(weight).wrap(with_signed_zeros(local_part(weight), local_part(mask)))
    if torch.equal(active_connections(weight), mask):
        return weight
    return weight.masked_fill(mask & (weight == 0), -0.0).masked_fill(~mask, 0.0)


def active_connections(weight: Tensor) -> Tensor:
    """The mask that `with_signed_zeros` wrote into a weight.

    Example:
        >>> active_connections(torch.tensor([-0.0, 0.0, 5.0]))
        tensor([ True, False,  True])
    """
    if is_cut(weight):
        return Cut.of(weight).wrap(active_connections(local_part(weight)))
    return (weight != 0) | torch.signbit(weight)
