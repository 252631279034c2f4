"""What is kept for a weight's connections beside it: numbers of the algorithm, and what forward passes do not see."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy import masks
from rarefy.checkpoint.matching import in_weight
from rarefy.distributed import local_part
from rarefy.errors import RarefyError
from rarefy.storage.protocol import Carry, Storage
from rarefy.storage.sharded import ShardedStorage

# Of no topology: checksums are not negative.
_LOST = -1


class ConnectionState:
    """Named tensors with one number a connection, in the form of the storage that the weight has.

    Args:
        initial: what a new connection starts with, by name; without names there is nothing to keep.

    Attributes:
        entries: by name, float32 or wider.
    """

    def __init__(self, initial: Mapping[str, float]) -> None:
        self.initial = dict(initial)
        self.entries: dict[str, Tensor] = {}
        self._drafts: dict[str, Tensor] = {}
        self._topology = 0

    def __bool__(self) -> bool:
        return bool(self.initial)

    @property
    def bytes(self) -> int:
        """Of all entries."""
        return sum(tensor.nbytes for tensor in self.entries.values())

    def start(self, storage: Storage) -> None:
        """Gives every connection the initial numbers."""
        weight = storage.weight
        # Small changes would be lost in an average held in bfloat16.
        dtype = torch.promote_types(weight.dtype, torch.float32)
        dense = {
            name: torch.full(storage.shape, value, dtype=dtype, device=weight.device)
            for name, value in self.initial.items()
        }
        self.store(storage, dense)
        self._topology = storage.fingerprint if self else 0

    def entries_on(self, device: torch.device) -> dict[str, Tensor]:
        """The entries, on the device that the weight has by now."""
        for name, tensor in self.entries.items():
            if tensor.device != device:
                self.entries[name] = tensor.to(device)
        return self.entries

    def draft(self, device: torch.device) -> dict[str, Tensor]:
        """Copies of the entries, to be written before a step; what is written counts once `keep_draft` is called."""
        self._drafts = {name: tensor.clone() for name, tensor in self.entries_on(device).items()}
        return self._drafts

    def keep_draft(self) -> None:
        """Called when the step is over that the last draft was made for."""
        self.entries |= self._drafts
        self._drafts = {}

    def drop_draft(self) -> None:
        """Called when another step begins: the one that the draft was made for raised an error."""
        self._drafts = {}

    def dense(self, storage: Storage) -> dict[str, Tensor]:
        """In the shape of the dense weight, with the initial numbers at inactive positions."""
        if not self:
            return {}
        entries = self.entries_on(storage.weight.device)
        return {name: self._dense(storage, name, tensor) for name, tensor in entries.items()}

    def _dense(self, storage: Storage, name: str, entries: Tensor) -> Tensor:
        spread = storage.spread(entries)
        # From values alone it is new, and zero where nothing is active.
        if storage.kind == "compact" and self.initial[name] == 0:
            return spread
        own = spread.clone() if spread is entries else spread
        return masks.fill_inactive_(own, storage.mask, self.initial[name])

    def store(self, storage: Storage, dense: Mapping[str, Tensor]) -> None:
        """Takes dense tensors over, as far as their connections are active; nobody else may need them."""
        if not self:
            return
        for name, tensor in dense.items():
            # Compact storage has no room for inactive positions; others keep the initial numbers there.
            if storage.kind != "compact":
                tensor = masks.fill_inactive_(tensor, storage.mask, self.initial[name])
            self.entries[name] = storage.collect(tensor)

    def follow(self, storage: Storage, carry: Carry) -> None:
        """Called when the storage got another topology, which its entries were carried to."""
        if self:
            for name, tensor in self.entries_on(storage.weight.device).items():
                self.entries[name] = carry(tensor, self.initial[name])
            self._topology = storage.fingerprint

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Gives the entries another form, as the storage got one."""
        self.entries = {name: change(tensor) for name, tensor in self.entries.items()}

    def after_load(self, storage: Storage) -> None:
        """Starts afresh where a state dict brought another topology: that is another model."""
        if self and storage.fingerprint != self._topology:
            self.start(storage)

    def saved(self, storage: Storage) -> dict[str, Any]:
        """The numbers in row-major order of the active connections; where the weight is cut, DTensors of its shape."""
        if isinstance(storage, ShardedStorage):
            entries = self.entries_on(storage.entries.device)
            return {name: storage.cut.wrap(tensor.clone()) for name, tensor in entries.items()}
        mask = storage.mask
        return {name: tensor[mask] for name, tensor in self.dense(storage).items()}

    def load(self, storage: Storage, saved: Mapping[str, Tensor]) -> None:
        """Goes on from what `saved` returned; without it from the beginning."""
        # Names that the file has nothing of keep these.
        self.start(storage)
        if isinstance(storage, ShardedStorage):
            self._load_pieces(storage, saved)
            return
        mask = storage.mask
        dense = self.dense(storage)
        for name in dense.keys() & saved.keys():
            found = saved[name]
            # Of a model that was cut the numbers come in the shape of the weight.
            dense[name][mask] = (found[mask] if found.shape == mask.shape else found).to(dense[name])
        self.store(storage, dense)

    def _load_pieces(self, storage: ShardedStorage, saved: Mapping[str, Tensor]) -> None:
        own_mask = storage.own_mask
        for name in self.entries.keys() & saved.keys():
            # Filled in place below, and what is loaded is the caller's.
            own = local_part(storage.loaded_entries(saved[name])).to(self.entries[name], copy=True)
            self.entries[name] = masks.fill_inactive_(own, own_mask, self.initial[name])


def check_topology(name: str, storage: Storage, topology: int) -> None:
    """Refuses what was saved for other connections.

    Raises:
        RarefyError: `topology` is not the fingerprint of the storage.

    Example:
        >>> from rarefy.storage.masked import MaskedStorage
        >>> storage = MaskedStorage(torch.nn.Linear(2, 2), "weight")
        >>> check_topology("weight", storage, storage.fingerprint)
    """
    if storage.fingerprint != topology:
        raise RarefyError(
            f"the sparsity state of {name} belongs to another topology; load the model's state dict first, and the "
            "sparsity's of the same moment after it"
        )


class ForwardSet:
    """Keeps the values of some connections aside between optimizer steps, so that forward passes find zeros there.

    The weight itself holds what forward passes use, so nothing that reads it needs a hook: any module, any
    transform and any storage computes with it, and the gradient of the connections aside is what it would be for a
    zero. `show` puts their values back for the optimizer, `hide` takes them aside again.

    Attributes:
        hidden: bool, in the form of the storage's entries: active connections that forward passes do not use; None if
            they use all.
    """

    def __init__(self) -> None:
        self.hidden: Tensor | None = None
        self._aside: Tensor | None = None
        # Of the topology, while a state dict is loaded that may bring another one.
        self._known: int | None = None

    @property
    def is_hiding(self) -> bool:
        """Whether values are kept aside."""
        return self._aside is not None

    @property
    def is_showing(self) -> bool:
        """Whether the weight has values that forward passes shall not see: within a step."""
        return self.hidden is not None and self._aside is None

    @property
    def bytes(self) -> int:
        """Of the values aside, and of the marks of their connections."""
        return sum(tensor.nbytes for tensor in (self.hidden, self._aside) if tensor is not None)

    @torch.no_grad()
    def hide(self, weight: Tensor) -> None:
        """Takes the values of hidden connections aside."""
        # Taken aside twice, the zeros would be what is put back.
        if self.hidden is None or self._aside is not None:
            return
        self.hidden = self.hidden.to(weight.device)
        values = weight.data
        self._aside = masks.zero_inactive_(values.clone(), self.hidden)
        masks.zero_inactive_(values, ~self.hidden)

    @torch.no_grad()
    def show(self, weight: Tensor) -> None:
        """Puts the values back, except where somebody wrote others in the meantime."""
        if self._aside is not None and self.hidden is not None:
            values = weight.data
            torch.where(self._is_untouched(values), self._aside.to(values), values, out=values)
        self._aside = None

    def true_values(self, weight: Tensor) -> Tensor:
        """The values as the optimizer sees them."""
        if self._aside is None or self.hidden is None:
            return weight.detach()
        values = weight.detach()
        return torch.where(self._is_untouched(values), self._aside.to(values), values)

    def _is_untouched(self, values: Tensor) -> Tensor:
        """Which hidden connections are zero, as they were left."""
        assert self.hidden is not None
        return (values == 0).logical_and_(self.hidden.to(values.device))

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Gives what is kept another form, as the storage got one."""
        self.hidden = None if self.hidden is None else change(self.hidden)
        self._aside = None if self._aside is None else change(self._aside)

    def placed(self, storage: Storage) -> Tensor | None:
        """What is hidden, each connection where the weight has it, whatever order the storage's entries are in."""
        # The others have entries in their places; of a weight that is cut, this would be all pieces.
        return (
            self.hidden if self.hidden is None or storage.kind != "compact" else storage.spread(self.hidden)
        )

    def place(self, placed: Tensor | None, storage: Storage) -> None:
        """Takes back what `placed` returned, once storage or topology are others."""
        self.hidden = placed if placed is None or storage.kind != "compact" else storage.collect(placed)

    def forget(self) -> None:
        """Begins anew with a weight that holds its true values: forward passes use all connections."""
        self.hidden = None
        self._aside = None

    def before_load(self, storage: Storage) -> None:
        """Called before a state dict is loaded that has a mask."""
        if self.hidden is not None and storage.has_lost_mask:
            # What was kept aside belongs to connections that nobody knows.
            self.forget()
            self._known = _LOST
            return
        self._known = None if self.hidden is None else storage.fingerprint

    @torch.no_grad()
    def after_load(self, storage: Storage) -> None:
        """Goes on with a weight that was loaded: forward passes use whatever is not zero in it."""
        if self.hidden is None and self._known != _LOST:
            return
        loaded = storage.entries.detach()
        # What was kept aside of another topology belongs to other connections.
        if self.hidden is not None and self._known in (None, storage.fingerprint):
            hidden = self.hidden.to(loaded.device)
            aside = torch.zeros_like(loaded) if self._aside is None else self._aside.to(loaded)
        else:
            hidden = storage.collect(storage.mask)
            aside = torch.zeros_like(loaded)
        self._known = None
        self.hidden = hidden & (loaded == 0)
        self._aside = torch.where(self.hidden, aside, 0)

    def saved(self, storage: Storage) -> dict[str, Tensor]:
        """Where forward passes use fewer connections than are active: which, and the values of the others.

        Args:
            storage: of the weight.

        Returns:
            `forward`, bool, and `aside`, in row-major order of the active connections; DTensors of the weight's shape
            where that is cut.
        """
        assert self.hidden is not None
        hidden = self.hidden.to(storage.entries.device)
        aside = torch.where(hidden, self.true_values(storage.entries), 0)
        if isinstance(storage, ShardedStorage):
            wrap = storage.cut.wrap
            return {"forward": wrap(storage.own_mask & ~hidden), "aside": wrap(aside)}
        mask = storage.mask
        return {"forward": ~storage.spread(hidden)[mask], "aside": storage.spread(aside)[mask]}

    def take_aside(self, saved: Tensor, storage: Storage) -> None:
        """Takes back the values that `saved` returned, for the connections that are hidden."""
        if self.hidden is None:
            return
        dense = in_weight(storage.mask, saved)
        self._aside = torch.where(self.hidden, storage.collect(dense).to(storage.entries), 0)
