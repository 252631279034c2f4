"""Masked storage of a weight that `fully_shard` has cut: a piece of the weight in each process, its mask beside it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import kernels, masks
from rarefy.distributed import WHOLE_WEIGHTS, Cut, combined, cut_by, is_cut, local_part
from rarefy.errors import RarefyError
from rarefy.storage.gradients import DenseGradient, LastSelected
from rarefy.storage.masked import MaskedStorage, cut_in_pieces, free_mask_leaf, resized, taken_away
from rarefy.storage.optimizer_state import begin_state, rest_inactive
from rarefy.storage.protocol import Carry, Storage, checksum
from rarefy.storage.ranking import Score
from rarefy.ties import TieOrder
from rarefy.torch_private.ddp import is_managed_by_fully_shard


class ShardedStorage:
    """A piece of a dense weight with exact zeros, and the same piece of its mask as a buffer beside it.

    Weight, mask, gradient and optimizer state are DTensors. Ordinary steps touch the pieces of this process alone.
    `mask`, `dense_weight`, `spread` and `keep_top` gather one whole weight, so that all processes must ask for it
    together; so they must set masks, of which counts and checksums are exchanged. While a forward pass has the weight
    gathered, the module holds another tensor; the piece is remembered.

    Args:
        module: holds the weight.
        leaf: attribute name of the weight.
        mask_leaf: name of the buffer with the mask.
        mask: bool, the mask of the whole weight; None makes all connections active.
    """

    kind = "masked"
    form = "masked"
    has_lost_mask = False

    def __init__(self, module: nn.Module, leaf: str, mask_leaf: str, mask: Tensor | None = None) -> None:
        self.module = module
        self.leaf = leaf
        self.mask_leaf = mask_leaf
        self.last_selected = LastSelected()
        self._weight: nn.Parameter = getattr(module, leaf)
        self.cut = Cut.of(self._weight)
        whole = torch.ones(self.shape, dtype=torch.bool) if mask is None else mask
        # Out of the way of a whole mask that may be there.
        if mask_leaf in dict(module.named_buffers(recurse=False)):
            delattr(module, mask_leaf)
        own = self.cut.own(whole).clone().to(self.entries.device)
        module.register_buffer(mask_leaf, self.cut.wrap(own))
        self.active = int(whole.count_nonzero())
        self.fingerprint = checksum(whole)

    # ---- the pieces ----

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the optimizer trains, a DTensor, also while the module has it gathered."""
        present = getattr(self.module, self.leaf)
        if present is not self._weight and is_cut(present):
            self._weight = present
            self.cut = Cut.of(present)
        return self._weight

    @property
    def entries(self) -> Tensor:
        """The piece of the weight."""
        return local_part(self.weight)

    @property
    def mask_in_pieces(self) -> Tensor:
        """The mask, bool, a DTensor like the weight."""
        return getattr(self.module, self.mask_leaf)

    @property
    def own_mask(self) -> Tensor:
        """The piece of the mask, bool."""
        return local_part(self.mask_in_pieces)

    @property
    def is_in_place(self) -> bool:
        """Whether the module has both."""
        weight = getattr(self.module, self.leaf, None)
        mask: Any = getattr(self.module, self.mask_leaf, None)
        return isinstance(weight, nn.Parameter) and is_cut(mask) and mask.shape == weight.shape

    def check_in_place(self) -> None:
        """Refuses a weight that other code took out of its module.

        Raises:
            RarefyError: it was parametrized, removed, resized, or cut in another way.
        """
        weight = getattr(self.module, self.leaf, None)
        mask: Any = getattr(self.module, self.mask_leaf, None)
        if not isinstance(weight, nn.Parameter) or not is_cut(mask):
            raise taken_away(self.module, self.leaf)
        cut = cut_by(weight, self.module)
        if cut:
            raise cut_in_pieces(self.module, self.leaf, cut)
        if weight.shape != mask.shape:
            raise resized(self.module, self.leaf, mask.shape)

    # ---- the whole weight, for which all processes must ask ----

    @property
    def shape(self) -> torch.Size:
        """The shape of the whole weight."""
        return self.weight.shape

    @property
    def mask(self) -> Tensor:
        """The mask of the whole weight, gathered."""
        return self.cut.whole(self.own_mask)

    def dense_weight(self) -> Tensor:
        """The whole weight, gathered."""
        return self.cut.whole(self.entries)

    def spread(self, entries: Tensor) -> Tensor:
        """The whole tensor of a piece or of a DTensor, gathered."""
        return self.cut.whole(local_part(entries))

    def collect(self, dense: Tensor) -> Tensor:
        """The piece of a whole tensor or of a DTensor."""
        return local_part(dense) if is_cut(dense) else self.cut.own(dense).contiguous()

    def keep_top(self, score: Score, count: int, order: TieOrder) -> Tensor:
        """By the scores of the whole weight."""
        return masks.drop_lowest(self.mask, score(self.dense_weight()), self.active - count, order)

    # ---- facts that were measured when the mask was set, so that one process alone may ask ----

    def _measure(self) -> None:
        """Counts the connections and makes the checksum, of pieces; all processes must call it."""
        own = self.own_mask
        rows = self.cut.gathered(int(own.count_nonzero()), checksum(own), own.numel())
        self.active = int(sum(active for active, _, _ in rows))
        # Pieces of rows follow one another in the whole mask.
        in_order = self.cut.dimension == 0
        pieces = [(int(one), int(length)) for _, one, length in rows]
        self.fingerprint = combined(pieces) if in_order else checksum(self.mask)

    @property
    def nonzero(self) -> int:
        """As many as are active: what somebody writes beside them is gone after the next step."""
        return self.active

    @property
    def index_bytes(self) -> int:
        """One byte a position, of the pieces of all processes."""
        return self.shape.numel()

    # ---- topology ----

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> Carry:
        """Replaces the mask, zeroes what it drops, and lets the optimizers begin with what it grows.

        Args:
            mask: bool, of the whole weight, or a DTensor of it.
            optimizers: those whose state follows the connections.
        """
        self.restore_zeros(optimizers)
        own = self.own_mask
        wanted = self.collect(mask).to(own.device)
        grown = self.cut.wrap(wanted > own)
        stays = wanted & own
        own.copy_(wanted)
        self.prune(optimizers)
        begin_state(optimizers, self.weight, grown)
        self._measure()
        return lambda entries, number: masks.fill_inactive_(entries, stays, number)

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Zeroes weight, gradient and optimizer state of inactive connections."""
        self.check_in_place()
        weight = self.weight
        masks.zero_inactive_(self.entries, self.own_mask)
        if weight.grad is not None:
            masks.zero_inactive_(local_part(weight.grad), self.own_mask)
        rest_inactive(optimizers, weight, self.mask_in_pieces)

    def restore_zeros(self, optimizers: Iterable[Optimizer]) -> bool:
        """Prunes if somebody wrote to inactive positions."""
        entries = self.entries
        if not entries.is_cpu:
            # An answer from another device would have to be waited for.
            masks.zero_inactive_(entries, self.own_mask)
            return False
        is_written = not kernels.holds_zeros(entries, self.own_mask)
        if is_written:
            self.prune(optimizers)
        return is_written

    # ---- gradients ----

    def _check_whose(self) -> None:
        """Refuses DTensors of others, whose gradients may be anything; they can be told once there was a forward pass.

        Raises:
            RarefyError: `fully_shard` did not cut the weight.
        """
        if not is_managed_by_fully_shard(self.module):
            kind = type(self.module).__name__.removeprefix("FSDP")
            raise RarefyError(
                f"{self.leaf} of a {kind} is a DTensor that fully_shard did not make; {WHOLE_WEIGHTS}"
            )

    def before_forward(self, dense: DenseGradient) -> None:
        """Forgets a dense gradient that the user discarded; no hook tells when a backward pass begins."""
        grad = self.weight.grad
        dense.begin(None if grad is None else local_part(grad))

    def select_gradient(self, dense: DenseGradient | None) -> None:
        """Selects the gradient again: torch does not count what is written to many DTensors at once."""
        self.check_in_place()
        grad = self.weight.grad
        if grad is None:
            return
        own = local_part(grad)
        is_by_hand = not self.last_selected.is_of(grad)
        if dense is not None and is_by_hand and not kernels.holds_zeros(own, self.own_mask):
            dense.assign(grad)
        masks.zero_inactive_(own, self.own_mask)
        self.last_selected.remember(grad)

    def agreed(self, factor: float) -> float:
        """What the processes have found for a whole gradient, of which each saw a piece; all must ask.

        Args:
            factor: 1 where this piece tells nothing.
        """
        found = [one for (one,) in self.cut.gathered(factor) if one != 1]
        return found[0] if found else 1.0

    def own_gradient(self) -> None:
        """Copies another tensor than the one that was selected last."""
        grad = self.weight.grad
        if grad is not None and grad.layout is torch.strided and not self.last_selected.is_of(grad):
            self.weight.grad = grad.clone()

    @property
    def gradient_is_selected(self) -> bool:
        """Whether this very gradient was selected; True without one."""
        grad = self.weight.grad
        return grad is None or self.last_selected.is_of(grad)

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """Drops the mean gradient of inactive connections, once it was added to the dense one."""
        self.check_in_place()
        self._check_whose()
        own = local_part(grad)
        if dense is not None:
            if not self.last_selected.is_of(grad):
                dense.begin(None)
            dense.add(grad, self.mask_in_pieces)
        masks.zero_inactive_(own, self.own_mask)
        self.last_selected.remember(grad)
        if dense is not None:
            dense.seal(own)

    def carried_gradient(self, grad: Tensor) -> Tensor | None:
        """None: the gradient itself holds it."""
        return None

    def gradient_entries(self) -> Tensor:
        """Those of this piece, in row-major order; `fully_shard` has averaged them."""
        own = self.own_mask
        grad = self.weight.grad
        return self.entries.new_zeros(int(own.count_nonzero())) if grad is None else local_part(grad)[own]

    def set_gradient_entries(self, entries: Tensor) -> None:
        """Scattered over this piece."""
        weight = self.weight
        if weight.grad is None:
            weight.grad = torch.zeros_like(weight)
        local_part(weight.grad).masked_scatter_(self.own_mask, entries)

    def want_dense_gradient(self, dense: DenseGradient | None) -> None:
        """Nothing to do: the gradient is dense before its zeros are put in place."""

    # ---- files ----

    def take_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Lets the optimizers begin with what it grows; the buffer is loaded like any other."""
        if self.is_in_place and mask.shape == self.shape and not mask.is_meta:
            own = self.own_mask
            grown = self.collect(mask).to(own.device).bool() > own
            begin_state(optimizers, self.weight, self.cut.wrap(grown))

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Prunes by the mask that was loaded."""
        self.prune(optimizers)
        self._measure()

    def saved_entries(self, tensor: Tensor) -> Tensor:
        """As it is."""
        return tensor

    def loaded_entries(self, tensor: Tensor) -> Tensor:
        """A DTensor of a whole tensor, or of the active entries in row-major order; a DTensor as it is."""
        if is_cut(tensor):
            return tensor
        if tensor.dim() == 1 and len(self.shape) != 1:
            dense = tensor.new_zeros(self.shape)
            dense[self.mask.to(tensor.device)] = tensor
            tensor = dense
        return self.cut.wrap(self.collect(tensor).to(self.entries.device).clone())


def followed(storage: MaskedStorage) -> Storage:
    """The storage of the pieces of a weight that is cut since; the same one where something else cut it."""
    if cut_by(getattr(storage.module, storage.leaf), storage.module):
        return storage
    mask: Any = getattr(storage.module, storage.mask_leaf, None)
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        raise taken_away(storage.module, storage.leaf)
    return ShardedStorage(storage.module, storage.leaf, storage.mask_leaf, mask)


def in_pieces(module: nn.Module, leaf: str) -> ShardedStorage:
    """The storage that a weight starts with which is cut already, all of its connections active."""
    return ShardedStorage(module, leaf, free_mask_leaf(module, leaf))


def refuse_gathered(storage: Storage) -> None:
    """Refuses a forward pass with a weight that `fully_shard` cut since it became sparse, and that nothing follows.

    Its gradients would not be selected: they come for the pieces, which cannot be found while the weight is gathered.

    Raises:
        RarefyError: it is such a weight.
    """
    if isinstance(storage, MaskedStorage):
        kind = type(storage.module).__name__.removeprefix("FSDP")
        raise RarefyError(
            f"{storage.leaf} of a {kind} was cut by fully_shard after it became sparse, and no "
            "optimizer that is followed trains its pieces; build the optimizer after fully_shard and call "
            "sparsity.apply(optimizer) before the first forward pass"
        )
