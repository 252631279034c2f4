"""A module's weight between dense and compact, in place, and the mask beside it, a buffer that takes no memory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.tensors import Role, SparseWeight, as_array, become, in_mode_of
from rarefy.torch_private import (
    ADDS_LISTS,
    SUBTRACTS_LISTS,
    make_wrapper,
    mapped,
    no_subclass_functions,
    without_subclass_functions,
)

_aten = torch.ops.aten


class WeightMask(Tensor):
    """Which connections of a sparse weight are active: bool, the shape of the weight, built whenever it is read.

    A copy of it is a bool tensor with memory (a `CopiedMask`; in a pickle or a file a plain one). Writing another mask
    to it is refused.

    Args:
        weight: whose connections it shows.

    Example:
        >>> mask = torch.tensor([[True, False], [True, True]])
        >>> shown = WeightMask(SparseWeight.from_dense(torch.ones(2, 2), mask))
        >>> torch.equal(shown, mask), int(shown.sum())
        (True, 3)
    """

    _weight: SparseWeight
    __torch_function__ = no_subclass_functions

    @staticmethod
    def __new__(cls, weight: SparseWeight) -> Any:
        """A wrapper of the weight's shape and place."""
        return make_wrapper(cls, weight.shape, dtype=torch.bool, device=weight.device)

    def __init__(self, weight: SparseWeight) -> None:
        self._weight = weight
        self._snapshot: tuple[Any, Tensor] | None = None

    @property
    def weight(self) -> SparseWeight:
        """Whose connections it shows."""
        return self._weight

    def dense(self) -> Tensor:
        """As a plain bool tensor.

        Raises:
            RarefyError: the weight is a dense tensor by now.
        """
        weight: Any = self._weight
        if not isinstance(weight, SparseWeight):
            raise RarefyError(
                "a weight in compact storage was exchanged for a dense tensor by torch.utils.swap_tensors, and its "
                "mask is lost; write to it with copy_ or load_state_dict instead, or set compute: masked; this model "
                "can go on after rarefy.finalize(model), with sparsity and optimizer applied anew"
            )
        return weight.topology.mask()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (_aten.detach.default, _aten.alias.default):
            with in_mode_of(args[0]):
                return WeightMask(args[0].weight)
        if func._schema.is_mutable and isinstance(args[0], WeightMask):
            return args[0]._write(func, *args[1:], **(kwargs or {}))
        return func(*mapped(_shown, args), **mapped(_shown, kwargs or {}))

    def _write(self, func: Any, *args: Any, **kwargs: Any) -> WeightMask:
        shown = self.dense()
        before = shown.clone()
        func(shown, *mapped(_shown, args), **mapped(_shown, kwargs))
        # `load_state_dict` writes the mask that its weight has taken already, which is no change.
        if not torch.equal(before, shown):
            raise RarefyError(
                "a write to the mask of a compact weight is not allowed; load a state dict that has weight and mask, "
                "or set compute: masked"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dense().as_subclass(CopiedMask)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dense().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"WeightMask(shape={tuple(self.shape)}, connections={self._weight.connections})"

    def data_ptr(self) -> int:
        """The address of a snapshot that is kept as long as this tensor."""
        return self.untyped_storage().data_ptr()

    def untyped_storage(self) -> Any:
        """The memory of that snapshot."""
        topology = self._weight.topology
        if self._snapshot is None or self._snapshot[0] is not topology:
            self._snapshot = (topology, self.dense())
        return self._snapshot[1].untyped_storage()

    def numpy(self, **options: Any) -> Any:
        """A copy as an array, which is read-only."""
        return as_array(self.dense(), options)

    def tolist(self) -> Any:
        """As nested lists."""
        return self.dense().tolist()

    def share_memory_(self) -> WeightMask:
        """The indices are shared with the weight's."""
        return self


class CopiedMask(Tensor):
    """The mask in a copy of a model: a bool tensor of which differences can be taken, as averages of buffers do.

    An average of masks, written back, is true where any of them was: it shows all connections that the average of the
    weights has.

    Example:
        >>> mask = torch.tensor([True, False]).as_subclass(CopiedMask)
        >>> mask.copy_(mask + (torch.tensor([False, False]) - mask) / 2).tolist()
        [True, False]
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in ADDS_LISTS:
            return _add_differences(*args, **(kwargs or {}))
        if func in _DIFFERENCES:
            args = mapped(_number, args)
        with without_subclass_functions():
            result = func(*args, **(kwargs or {}))
        # a mask that is moved or detached stays one, so that its average can go on
        is_mask = type(result) is Tensor and result.dtype == torch.bool
        return result.as_subclass(cls) if is_mask and func in _STAYS else result

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.as_subclass(Tensor).clone().as_subclass(CopiedMask)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)


_DIFFERENCES = (torch.sub, Tensor.sub, Tensor.__sub__, Tensor.__rsub__, SUBTRACTS_LISTS)
_STAYS = (Tensor.to, Tensor.cpu, Tensor.cuda, Tensor.detach, Tensor.clone)


def _number(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bool else value


def _add_differences(
    masks: Sequence[Tensor], differences: Sequence[Tensor], counts: Any = None, *, alpha: float = 1.0
) -> None:
    """What `ADDS_LISTS` do to averages, of which bool tensors keep what is not zero."""
    factors = itertools.repeat(alpha) if counts is None else (1 / count for count in counts)
    for mask, difference, factor in zip(masks, differences, factors, strict=False):
        mask.copy_(mask.float() + difference * factor)


def _shown(value: Any) -> Any:
    return value.dense() if isinstance(value, WeightMask) else value


def _send(mask: WeightMask) -> Any:
    """Another process gets the mask of the weight that it gets; a dense copy's memory would be gone before it came."""
    return WeightMask, (mask.weight,)


ForkingPickler.register(WeightMask, _send)


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is Hugging Face's linear layer, or one like it, whose weight is [in, out].

    Example:
        >>> is_conv1d(nn.Conv1d(2, 2, 2))
        False
    """
    kind = type(module)
    # By name, so that Transformers is neither needed nor imported.
    is_theirs = kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"
    return is_theirs or kind.__name__ == "SparseConv1D"


def make_compact(
    module: nn.Module, leaf: str, mask: Tensor, mask_leaf: str, block: tuple[int, int] | None = None
) -> SparseWeight:
    """Stores only the active connections of a weight.

    Hooks, references and optimizers of the parameter stay valid. Nothing random is drawn.

    Args:
        module: holds the weight.
        leaf: attribute name of the weight.
        mask: bool, its shape.
        mask_leaf: name of the buffer that shows the mask.
        block: outputs and inputs of the blocks in which masks of the weight come, if they do.

    Returns:
        The parameter, which is the same object as before.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> weight = layer.weight
        >>> mask = weight > 0
        >>> make_compact(layer, "weight", mask, "weight_mask") is weight is layer.weight
        True
        >>> type(layer) is nn.Linear and bool((layer.weight_mask == mask).all())
        True
    """
    parameter: Any = getattr(module, leaf)
    dense = parameter.dense() if isinstance(parameter, SparseWeight) else parameter.detach()
    weight = SparseWeight.from_dense(dense, mask, Role.MANAGED, is_conv1d(module), block)
    become(parameter, weight.requires_grad_(parameter.requires_grad))
    show_mask(module, parameter, mask_leaf)
    return parameter


def show_mask(module: nn.Module, weight: SparseWeight, mask_leaf: str) -> None:
    """Puts the mask of a compact weight beside it."""
    if mask_leaf in dict(module.named_buffers(recurse=False, remove_duplicate=False)):
        # A buffer that is there keeps its place in state dicts.
        setattr(module, mask_leaf, WeightMask(weight))
    else:
        module.register_buffer(mask_leaf, WeightMask(weight))


def make_dense(module: nn.Module, leaf: str, mask_leaf: str | None = None) -> Any:
    """The reverse of `make_compact`: zeros at inactive connections.

    Args:
        module: holds the weight; a dense one is left as it is.
        leaf: attribute name of the weight.
        mask_leaf: a buffer to be removed, if it is there.
    """
    parameter: Any = getattr(module, leaf)
    if isinstance(parameter, SparseWeight):
        become(parameter, nn.Parameter(parameter.dense(), parameter.requires_grad))
    for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
        if name == mask_leaf or (isinstance(buffer, WeightMask) and buffer.weight is parameter):
            delattr(module, name)
    return parameter
