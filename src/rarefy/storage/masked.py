"""Masked storage: a dense weight with exact zeros, and its mask beside it."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import kernels, masks
from rarefy.checkpoint.mask_names import free_mask_name
from rarefy.distributed import WHOLE_WEIGHTS, cut_by
from rarefy.errors import RarefyError
from rarefy.nn import WeightMask
from rarefy.storage.gradients import ActivePlaces, DenseGradient, LastSelected
from rarefy.storage.optimizer_state import begin_state, rest_inactive
from rarefy.storage.protocol import Carry, Storage, checksum
from rarefy.storage.ranking import Score
from rarefy.ties import TieOrder
from rarefy.torch_private import attribute


class MaskedStorage:
    """A dense weight with exact zeros, and its mask as the persistent buffer `<leaf>_mask` beside it, or
    `<leaf>_sparsity_mask` where the module has something of that name.

    Both are looked up in the module each time, so they may be moved, converted or loaded at will.
    """

    kind = "masked"
    form = "masked"

    def __init__(self, module: nn.Module, leaf: str) -> None:
        self.module = module
        self.leaf = leaf
        self.mask_leaf = free_mask_leaf(module, leaf)
        self.last_selected = LastSelected()
        self.places = ActivePlaces()
        self._read_at: Tensor | None = None
        # The buffer that was set or loaded last; None while one is loaded, so that the next one is taken.
        self._known: Tensor | None = None
        # A weight in channels_last would have a mask that the kernels cannot read in order.
        mask = torch.ones_like(self.weight, dtype=torch.bool, memory_format=torch.contiguous_format)
        self._write_mask(mask)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that holds the weight."""
        found = attribute(self.module, self.leaf)
        # Which raises torch's own error.
        return getattr(self.module, self.leaf) if found is None else found

    @property
    def is_in_place(self) -> bool:
        """Whether the module has both, as a parameter and as a bool tensor of its shape."""
        weight = getattr(self.module, self.leaf, None)
        mask = getattr(self.module, self.mask_leaf, None)
        if not isinstance(weight, nn.Parameter) or not isinstance(mask, Tensor):
            return False
        return mask.dtype == torch.bool and mask.shape == weight.shape

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.weight.shape

    @property
    def has_lost_mask(self) -> bool:
        """Whether another tensor is in the place of the mask, with other connections."""
        own = attribute(self.module, self.mask_leaf)
        # Another tool's tensor under the same name is no mask, and is refused elsewhere.
        if own is self._known or not isinstance(own, Tensor) or own.dtype != torch.bool:
            return False
        # One that was moved to another device has the same connections.
        if self._known is not None and (own.is_meta or not torch.equal(self._known.to(own.device), own)):
            return True
        self._known = own
        return False

    @property
    def mask(self) -> Tensor:
        """The mask, bool, of the weight's shape.

        Raises:
            RarefyError: it is lost.
        """
        own = attribute(self.module, self.mask_leaf)
        if own is None or own is not self._known:
            refuse_lost_mask(self)
            return getattr(self.module, self.mask_leaf)
        return own

    @property
    def active(self) -> int:
        """Counted in the mask."""
        return int(self.mask.count_nonzero())

    @property
    def nonzero(self) -> int:
        """Counted in the mask, and in what somebody wrote beside it."""
        weight = self.weight.detach()
        return (
            self.active if kernels.holds_zeros(weight, self.mask) else int((self.mask | (weight != 0)).sum())
        )

    @property
    def fingerprint(self) -> int:
        """Of the mask."""
        return checksum(self.mask)

    @property
    def index_bytes(self) -> int:
        """One byte a position."""
        return self.mask.numel()

    @property
    def entries(self) -> Tensor:
        """The weight itself."""
        return self.weight

    def dense_weight(self) -> Tensor:
        """The weight itself."""
        return self.weight.detach()

    def spread(self, entries: Tensor) -> Tensor:
        """As it is."""
        return entries

    def collect(self, dense: Tensor) -> Tensor:
        """As it is."""
        return dense

    def keep_top(self, score: Score, count: int, order: TieOrder) -> Tensor:
        """By the score of the whole weight."""
        return masks.drop_lowest(self.mask, score(self.dense_weight()), self.active - count, order)

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> Carry:
        """Replaces the mask, zeroes what it drops, and lets the optimizers begin with what it grows."""
        # What somebody wrote at inactive positions must not become the start of a new connection.
        self.restore_zeros(optimizers)
        # Before the mask is written, which happens in place.
        grown = mask > self.mask
        self._write_mask(mask)
        self.prune(optimizers)
        begin_state(optimizers, self.weight, grown)
        return lambda entries, number: masks.fill_inactive_(entries, self.mask & ~grown, number)

    def _write_mask(self, mask: Tensor) -> None:
        """A mask of the same place is overwritten in place so that views of it stay valid."""
        if self.mask_leaf in dict(self.module.named_buffers(recurse=False)) and self.mask.shape == mask.shape:
            self.mask.copy_(mask)
        else:
            self.module.register_buffer(self.mask_leaf, mask)
            self._known = mask

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Zeroes weight, gradient and optimizer state of inactive connections."""
        self.check_in_place()
        weight = self.weight
        mask = self.mask
        # Through `.data`: autograd lets nobody write to a leaf.
        masks.zero_inactive_(weight.data, mask)
        grad = weight.grad
        # Looked at before: a write would make one that has been used look like a new one.
        if grad is not None and not (grad.is_cpu and kernels.holds_zeros(grad, mask)):
            masks.zero_inactive_(grad, mask)
        rest_inactive(optimizers, weight, mask)

    def check_in_place(self) -> None:
        """Refuses a weight that other code took out of its module.

        Raises:
            RarefyError: it was parametrized, pruned by torch, removed, resized, or cut in pieces.
        """
        weight = attribute(self.module, self.leaf)
        mask = attribute(self.module, self.mask_leaf)
        if not isinstance(weight, nn.Parameter) or not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise taken_away(self.module, self.leaf)
        cut = cut_by(weight, self.module)
        if cut:
            raise cut_in_pieces(self.module, self.leaf, cut)
        if weight.shape != mask.shape:
            raise resized(self.module, self.leaf, mask.shape)

    def restore_zeros(self, optimizers: Iterable[Optimizer]) -> bool:
        """Prunes if somebody wrote to inactive positions; looking costs half of what writing does."""
        weight = self.weight
        if not weight.is_cpu:
            # An answer from another device would have to be waited for.
            masks.zero_inactive_(weight.data, self.mask)
            return False
        is_written = not kernels.holds_zeros(weight, self.mask)
        if is_written:
            self.prune(optimizers)
        return is_written

    def select_gradient(self, dense: DenseGradient | None) -> None:
        """Selects again what somebody wrote to since it was accumulated, or what nobody accumulated."""
        self.check_in_place()
        grad = self.weight.grad
        if grad is None or self.gradient_is_selected:
            return
        if (
            # A gradient that somebody assigned, with numbers at inactive positions, is a dense one; one that was
            # selected before tells nothing about them.
            dense is not None
            and not self.last_selected.is_of(grad)
            and not kernels.holds_zeros(grad, self.mask)
        ):
            dense.assign(grad)
        masks.zero_inactive_(grad, self.mask)
        self.last_selected.remember(grad)

    @property
    def gradient_is_selected(self) -> bool:
        """True without a gradient to select."""
        grad = self.weight.grad
        return grad is None or self.last_selected.is_intact(grad)

    def own_gradient(self) -> None:
        """Copies another tensor than the one that was selected last."""
        grad = self.weight.grad
        if grad is not None and grad.layout is torch.strided and not self.last_selected.is_of(grad):
            # Contiguous, as one number that was expanded has no room for zeros.
            self.weight.grad = grad.clone(memory_format=torch.contiguous_format)

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """Drops the gradient of inactive connections, once it was added to the dense one."""
        mask = self.mask
        if dense is not None:
            dense.add(grad, mask)
        masks.zero_inactive_(grad, mask)
        self.last_selected.remember(grad)
        if dense is not None:
            dense.seal(grad)

    def carried_gradient(self, grad: Tensor) -> Tensor | None:
        """None: the gradient itself holds it."""
        return None

    def gradient_entries(self) -> Tensor:
        """Gathered, in row-major order."""
        grad = self.weight.grad
        if grad is None:
            return self.weight.new_zeros(self.active)
        # Kept for `set_gradient_entries`, which the same exchange calls next.
        self._read_at = self.places.of(self.mask)
        return grad.detach().flatten().index_select(0, self._read_at)

    def set_gradient_entries(self, entries: Tensor) -> None:
        """Scattered; the zeros stay in place."""
        weight = self.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
            self.last_selected.remember(weight.grad)
        # Asked before the write, which is one of ours and leaves the zeros in place.
        is_intact = self.last_selected.is_intact(weight.grad)
        places = self._read_at
        self._read_at = None
        if places is not None and weight.grad.is_contiguous():
            weight.grad.view(-1).index_copy_(0, places, entries)
        else:
            weight.grad.masked_scatter_(self.mask, entries)
        if is_intact:
            self.last_selected.remember(weight.grad)

    def want_dense_gradient(self, dense: DenseGradient | None) -> None:
        """Nothing to do: the gradient is dense before its zeros are put in place."""

    def take_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Lets the optimizers begin with what it grows; the buffer is loaded like any other."""
        # Of connections that nobody knows, none can be told to be new.
        is_known = self.is_in_place and not self.has_lost_mask
        if is_known and mask.shape == self.shape and not mask.is_meta:
            begin_state(optimizers, self.weight, mask.to(self.mask.device).bool() > self.mask)
        self._known = None

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Prunes by the mask that was loaded."""
        self.prune(optimizers)

    def saved_entries(self, tensor: Tensor) -> Tensor:
        """The dense tensor as it is."""
        return tensor

    def loaded_entries(self, tensor: Tensor) -> Tensor:
        """Dense."""
        # One-dimensional is what compact storage saves: one entry a connection.
        if tensor.dim() != 1 or self.weight.dim() == 1:
            return tensor
        dense = tensor.new_zeros(self.shape)
        dense[self.mask.to(tensor.device)] = tensor
        return dense


def taken_away(module: nn.Module, leaf: str) -> RarefyError:
    """The error about a weight that other code took out of its module.

    Example:
        >>> str(taken_away(nn.Linear(2, 2), "weight"))[:46]
        'weight of a Linear was sparse and is no parame'
    """
    kind = type(module).__name__.removeprefix("Parametrized")
    return RarefyError(
        f"{leaf} of a {kind} was sparse and is no parameter of it any more, or its mask is gone: it was parametrized "
        "(weight_norm, spectral_norm), pruned by torch.nn.utils.prune, prune.remove was called, or "
        "FullyShardedDataParallel flattened it; do that before sparsity.apply(model), or after rarefy.finalize(model); "
        f"{WHOLE_WEIGHTS}"
    )


def refuse_lost_mask(storage: Storage) -> None:
    """Refuses to go on with a weight of whose connections nobody knows.

    Args:
        storage: of the weight.

    Raises:
        RarefyError: something else took the place of its mask.

    Example:
        >>> refuse_lost_mask(MaskedStorage(nn.Linear(2, 2), "weight"))
    """
    if storage.has_lost_mask:
        shown = getattr(storage.module, storage.mask_leaf)
        if isinstance(shown, WeightMask):
            shown.dense()  # which says how its weight was exchanged
        raise RarefyError(
            f"the mask of {storage.leaf} of a {type(storage.module).__name__} is another tensor now, with other "
            "connections than its algorithm gave it: model.to_empty() left memory without values, or somebody assigned "
            "one; load a state dict that has the masks, or call rarefy.finalize(model), give it values and apply "
            "sparsity anew"
        )


def refuse_hidden(module: nn.Module, leaves: Iterable[str]) -> None:
    """Refuses a weight or a mask behind another thing of its name, which the module computes with.

    Args:
        module: that has them.
        leaves: their attribute names.

    Raises:
        RarefyError: a property or an attribute of the instance hides one.

    Example:
        >>> refuse_hidden(nn.Linear(2, 2), ["weight"])
    """
    for leaf in leaves:
        if getattr(module, leaf, None) is not attribute(module, leaf):
            raise taken_away(module, leaf)


def cut_in_pieces(module: nn.Module, leaf: str, cut: str) -> RarefyError:
    """The error about a weight of which each process holds a part.

    Example:
        >>> str(cut_in_pieces(nn.Linear(2, 2), "weight", "a DTensor"))[:35]
        'weight of a Linear is now a DTensor'
    """
    kind = type(module).__name__.removeprefix("FSDP")
    return RarefyError(f"{leaf} of a {kind} is now {cut}, and was sparse before; {WHOLE_WEIGHTS}")


def resized(module: nn.Module, leaf: str, shape: torch.Size) -> RarefyError:
    """The error about a weight that has another shape than its mask.

    Example:
        >>> str(resized(nn.Linear(2, 3), "weight", torch.Size([2, 2])))[:54]
        'weight of a Linear has the shape (3, 2) now, and had ('
    """
    now = tuple(getattr(module, leaf).shape)
    return RarefyError(
        f"{leaf} of a {type(module).__name__} has the shape {now} now, and had {tuple(shape)} when it became sparse; "
        "resize it before sparsity.apply(model), or call rarefy.finalize(model), resize it, and apply sparsity anew"
    )


def free_mask_leaf(module: nn.Module, leaf: str) -> str:
    """The name for the mask of a weight: `<leaf>_mask`, unless the module has something of its own there.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> layer.register_buffer("weight_mask", torch.ones(2, 2))
        >>> free_mask_leaf(layer, "weight"), free_mask_leaf(layer, "bias")
        ('weight_sparsity_mask', 'bias_mask')
    """
    return free_mask_name(leaf, lambda name: hasattr(module, name))
