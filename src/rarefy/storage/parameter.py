"""One sparse weight: its mask, its storage, and the optimizer state that follows its connections."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.checkpoint.matching import in_weight
from rarefy.distributed import is_cut, whole
from rarefy.filters import Candidate
from rarefy.masks import active_count
from rarefy.nn import make_compact, make_dense
from rarefy.patterns import Pattern
from rarefy.storage.compact import CompactStorage
from rarefy.storage.connection_state import ConnectionState, ForwardSet, check_topology
from rarefy.storage.factor import factor_since
from rarefy.storage.gradients import DenseGradient
from rarefy.storage.masked import MaskedStorage
from rarefy.storage.optimizer_state import change_state, make_states_dense
from rarefy.storage.protocol import Kind, Storage
from rarefy.storage.ranking import Score
from rarefy.storage.sharded import ShardedStorage, followed, in_pieces, refuse_gathered
from rarefy.ties import DEFAULT_ORDER, TieOrder
from rarefy.torch_private import attribute
from rarefy.torch_private.ddp import is_managed_by_fully_shard


class SparseParameter:
    """A weight that is sparse, whichever way it is stored.

    Args:
        candidate: the parameter and the modules that hold it.
        pattern: the structure that its masks obey.

    Attributes:
        steps: how many optimizer steps the weight has taken since the algorithm's step 0.
        has_learned: whether an optimizer used a gradient of it in the step in progress; it may be frozen since.
        tokens: rows of activations in one forward pass of its module, once that was seen; else None.
        dtype: of these activations.
        state: numbers of the algorithm's own, one a connection.
        forward: the connections that forward passes use.
        active_gradient: the gradient of the step in progress without its loss scale, in the form of `weight`, where
            the optimizer's own gradient still has it; else None.

    Raises:
        ConfigError: the pattern does not fit the weight's shape.
    """

    def __init__(self, candidate: Candidate, pattern: Pattern) -> None:
        pattern = pattern.on(candidate.axes)
        pattern.check(candidate.name, candidate.shape)
        self.name = candidate.name
        self.places = candidate.places
        self.pattern = pattern
        first = candidate.places[0]
        begin = in_pieces if is_cut(getattr(first.module, first.leaf)) else MaskedStorage
        self._storage: Storage = begin(first.module, first.leaf)
        self.mask_leaf = self._storage.mask_leaf
        self.dense_gradient = DenseGradient()
        self.active_gradient: Tensor | None = None
        self.state = ConnectionState({})
        self.forward = ForwardSet()
        self.steps = 0
        self.has_learned = False
        self.tokens: int | None = None
        self.dtype = torch.float32

    @property
    def storage(self) -> Storage:
        """How its zeros are held at present."""
        known = self._storage
        # `fully_shard` may cut the weight at any time after it was adopted, and tells nobody.
        if isinstance(known, MaskedStorage) and is_cut(attribute(known.module, known.leaf)):
            self._storage = followed(known)
        if self._storage is not known:
            # What was kept of the whole weight is cut as it was.
            self.forward.change(self._storage.collect)
            self.state.change(self._storage.collect)
            self.dense_gradient.take()
        return self._storage

    @property
    def is_sharded(self) -> bool:
        """Whether each process holds a piece of it alone."""
        return isinstance(self.storage, ShardedStorage)

    @property
    def module(self) -> nn.Module:
        """The module that holds the weight; the first one of a tied weight."""
        return self.places[0].module

    @property
    def weight(self) -> nn.Parameter:
        """The parameter that the optimizer trains, of the dense weight's shape in every storage."""
        weight = self._storage.weight
        return self.storage.weight if is_cut(weight) else weight

    @property
    def is_in_place(self) -> bool:
        """Whether the module still has the weight as a parameter of its own, with the mask beside it."""
        return self.storage.is_in_place

    def require_parameter(self) -> None:
        """Refuses to go on with a weight that somebody replaced by something computed.

        Raises:
            RarefyError: it is no parameter any longer, or its mask is gone.
        """
        self.storage.check_in_place()

    @property
    def shape(self) -> torch.Size:
        """The shape of the dense weight."""
        return self.storage.shape

    @property
    def mask(self) -> Tensor:
        """Bool tensor of the dense weight's shape, True = active; compact storage builds it on each read."""
        return self.storage.mask

    @property
    def mask_in_pieces(self) -> Tensor:
        """The mask of a sharded weight, a DTensor like it; of any other weight the mask."""
        return self.storage.mask_in_pieces if isinstance(self.storage, ShardedStorage) else self.mask

    @property
    def actual_sparsity(self) -> float:
        """The measured fraction of positions that are inactive and hold zeros; 0 for an empty weight."""
        return 1.0 - self.storage.nonzero / self.shape.numel() if self.shape.numel() else 0.0

    @property
    def active(self) -> int:
        """How many connections are active."""
        return self.storage.active

    @property
    def active_in_pieces(self) -> list[int]:
        """How many connections are active in each balanced group, or in the whole weight."""
        if self.pattern.axis is None:
            return [self.active]
        return [int(piece.count_nonzero()) for piece in self.pattern.split(self.mask)]

    def dense_weight(self) -> Tensor:
        """The dense weight with exact zeros, without gradient; do not write to it."""
        return self.storage.dense_weight()

    def keep_top(self, score: Score, count: int, order: TieOrder = DEFAULT_ORDER) -> Tensor:
        """The mask of the active connections with the highest scores, in the shape of the dense weight.

        Args:
            score: ranks weights, each by itself; given the dense weight, or the active ones in any order.
            count: how many to keep; clamped to the number of active ones.
            order: decides among equal scores.
        """
        return self.storage.keep_top(score, count, order)

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Gives the weight a new topology, all of which forward passes use.

        Connections that stay keep weight, optimizer state and connection state; dropped ones lose them; new ones start
        at zero, and with the initial numbers.

        Args:
            mask: bool, shape of the dense weight.
            optimizers: those whose state follows the connections.
        """
        self.show()
        self.forward.forget()
        self.state.follow(self.storage, self.storage.set_mask(mask, optimizers))

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """Makes weight, gradient and same-shaped optimizer state of inactive connections exact zeros."""
        self.storage.prune(optimizers)

    def become(self, kind: Kind, optimizers: Iterable[Optimizer]) -> None:
        """Changes the storage. The parameter stays the same object; weight, mask and states stay what they are.

        Args:
            kind: `masked`, or `compact` for the weight of a linear layer that is not tied.
            optimizers: those whose state takes the new shape.
        """
        if kind == self.storage.kind:
            return
        self.show()
        state = self.dense_state()
        hidden = self.forward.placed(self.storage)
        self._convert(kind, optimizers)
        self.store_state(state)
        self.forward.place(hidden, self.storage)
        self.hide()

    def _convert(self, kind: Kind, optimizers: Iterable[Optimizer]) -> None:
        """Changes the storage of weight, mask and optimizer state."""
        mask = self.mask
        leaf = self.places[0].leaf
        mask_leaf = self.storage.mask_leaf
        if kind == "compact":
            block = self.pattern.block
            make_compact(self.module, leaf, mask, mask_leaf, block)
            self._storage = CompactStorage(self.module, leaf, mask_leaf, block)
            # After the weight, since a state takes the topology of the weight that it belongs to.
            change_state(optimizers, self.weight, self.shape, self.storage.loaded_entries)
        else:
            make_states_dense(optimizers, self.weight)
            make_dense(self.module, leaf, mask_leaf)
            self._storage = MaskedStorage(self.module, leaf)
            # A masked storage begins with every connection active.
            self.storage.set_mask(mask, optimizers)

    def before_load(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Called before a state dict with this mask is loaded into the module."""
        self.forward.before_load(self.storage)
        hidden = self.forward.placed(self.storage)
        self.storage.take_mask(mask, optimizers)
        self.forward.place(hidden, self.storage)

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Called after a state dict was loaded into the module; it holds what forward passes use."""
        self.storage.after_load(optimizers)
        self.state.after_load(self.storage)
        self.forward.after_load(self.storage)

    # ---- what an algorithm keeps for each connection ----

    def start_state(self, initial: Mapping[str, float]) -> None:
        """Keeps numbers for each connection from now on.

        Args:
            initial: what a new connection starts with, by name.
        """
        self.state = ConnectionState(initial)
        self.state.start(self.storage)

    def dense_state(self) -> dict[str, Tensor]:
        """The numbers of each connection in the shape of the dense weight, initial ones at inactive positions."""
        return self.state.dense(self.storage)

    def store_state(self, dense: Mapping[str, Tensor]) -> None:
        """Takes over what `dense_state` returned, as it was changed, for the connections that are active by now."""
        self.state.store(self.storage, dense)

    def saved_connections(self) -> dict[str, Any]:
        """What is kept for each connection, for a state dict: in row-major order, independent of the storage."""
        saved: dict[str, Any] = {"state": self.state.saved(self.storage)} if self.state else {}
        if self.forward.hidden is not None:
            saved |= self.forward.saved(self.storage)
        return {**saved, "topology": self.storage.fingerprint} if saved else {}

    def load_connections(self, saved: Mapping[str, Any]) -> None:
        """Goes on from what `saved_connections` returned.

        Raises:
            RarefyError: it belongs to another topology.
        """
        self.show()
        if saved:
            check_topology(self.name, self.storage, saved["topology"])
        self.state.load(self.storage, saved.get("state", {}))
        self.forward.forget()
        if "forward" in saved:
            self.set_forward_mask(in_weight(self.mask, saved["forward"]))
        # A state without them was saved when the weight itself held them.
        if "aside" in saved:
            self.forward.take_aside(saved["aside"], self.storage)

    # ---- forward passes ----

    def set_forward_mask(self, mask: Tensor) -> bool:
        """Lets forward passes use only these connections, bool [shape of the dense weight]; whether all are active.

        The others are trained on as if their weight were used. Where one of these is inactive, nothing changes.
        """
        is_compact = self.storage.kind == "compact"
        # Compact storage collects of active connections alone.
        hidden = ~self.storage.collect(mask) if is_compact else self.mask & ~mask
        count = int(hidden.count_nonzero())
        # By counts, since torch counts several times as fast as it looks for one.
        if count + active_count(mask) != self.active:
            return False
        self.show()
        self.forward.forget()
        if count:
            self.forward.hidden = hidden if is_compact else self.storage.collect(hidden)
            self.hide()
        return True

    def show(self) -> None:
        """Puts the true values into the weight, for the optimizer or an update."""
        if self.forward.is_hiding:
            self.forward.show(self.storage.entries)

    def hide(self) -> None:
        """Takes the values aside that forward passes shall not see."""
        if self.forward.hidden is not None and not self.forward.is_hiding:
            self.forward.hide(self.storage.entries)

    def true_weight(self) -> Tensor:
        """A copy of the dense weight as the optimizer sees it, whatever forward passes use of it."""
        return self.storage.spread(self.forward.true_values(self.storage.entries)).clone()

    def as_used(self, entries: Tensor) -> Tensor:
        """A weight of its own with what forward passes use of these entries, as state dicts have it."""
        storage = self.storage
        hidden = self.forward.hidden
        used = entries.clone() if hidden is None else entries.masked_fill(hidden, 0)
        return storage.cut.wrap(used) if isinstance(storage, ShardedStorage) else storage.spread(used)

    def observe(self, x: Tensor) -> None:
        """Remembers what the module computes with, from the first input that it trains on."""
        if is_managed_by_fully_shard(self.module):
            refuse_gathered(self.storage)
        if self.tokens is None:
            is_autocast = torch.is_autocast_enabled(x.device.type)
            self.tokens = x.shape[:-1].numel()
            self.dtype = torch.get_autocast_dtype(x.device.type) if is_autocast else x.dtype

    # ---- gradients ----

    def before_forward(self) -> None:
        """Called before a forward pass whose gradient is collected."""
        if isinstance(self.storage, ShardedStorage):
            self.storage.before_forward(self.dense_gradient)

    def before_accumulation(self) -> None:
        """Called before a micro-batch is added to the gradient, while the dense gradient is collected."""
        self.dense_gradient.begin(self.weight.grad, self._factor_since, self.storage.carried_gradient)

    def after_accumulation(self, grad: Tensor, collects: bool) -> None:
        """Called once a micro-batch was added to the gradient `grad`."""
        self.storage.after_accumulation(grad, self.dense_gradient if collects else None)

    def finish_gradient(self, wants_dense: bool, wants_active: bool, scale: Tensor | None) -> None:
        """Called when an optimizer is about to use the gradient.

        Args:
            wants_dense: whether the dense gradient is collected for this step; it is from now on what was collected,
                times what the gradient was multiplied by since (a loss scale that was taken out, a clipped norm).
            wants_active: whether the update after this step asks for the gradient of active connections.
            scale: a loss scale that the optimizer will take out by itself.
        """
        if self.weight.grad is None:
            return
        self.storage.select_gradient(self.dense_gradient if wants_dense else None)
        grad = self.weight.grad  # one that was assigned with other connections has been replaced
        if wants_active:
            self.active_gradient = grad.detach().clone() if scale is None else grad.detach() / scale
        if wants_dense:  # a scaler leaves no other trace in the gradient than the factor that it takes out
            self.dense_gradient.scale(self._factor_since(grad) if scale is None else 1 / scale)
            self.dense_gradient.close()

    def _factor_since(self, grad: Tensor) -> float:
        """By what the gradient was multiplied since; 1 if it was changed in another way, as by averaging it."""
        return factor_since(self.storage, grad, self.dense_gradient.value)

    def saved_gradient(self) -> Any:
        """The dense gradient of a step that is not over, for a state dict: whole in each process; None without one."""
        saved = self.dense_gradient.saved()
        return whole(saved) if isinstance(saved, Tensor) else saved

    def load_gradient(self, saved: Any) -> None:
        """Goes on from what `saved_gradient` returned."""
        if self.is_sharded and isinstance(saved, Tensor):
            saved = self.storage.loaded_entries(saved)
        self.dense_gradient.load(saved, self.weight.device)

    def take_active_gradient(self, in_pieces: bool = False) -> Tensor | None:
        """The gradient of active connections, dense with zeros elsewhere, whoever put it there; None without one.

        Args:
            in_pieces: as the DTensor that it is in a sharded weight.
        """
        entries = self.weight.grad if self.active_gradient is None else self.active_gradient
        self.active_gradient = None
        if entries is None:
            return None
        return entries.detach() if in_pieces else self.storage.spread(self.storage.collect(entries.detach()))

    def gradient_entries(self) -> Tensor:
        """The gradient of active connections, one entry each; zeros without a gradient.

        The order depends on the storage, and in compact storage on the kernels in use.
        """
        return self.storage.gradient_entries()

    def set_gradient_entries(self, entries: Tensor) -> None:
        """Makes these the gradient of the active connections, in the order of `gradient_entries`.

        Args:
            entries: one-dimensional; nobody else needs it.
        """
        self.storage.set_gradient_entries(entries)

    def want_dense_gradient(self, wanted: bool) -> None:
        """Makes the next backward passes compute the dense gradient, or no longer, where that must be said before."""
        self.storage.want_dense_gradient(self.dense_gradient if wanted else None)
