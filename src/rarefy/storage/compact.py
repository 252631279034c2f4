"""Compact storage: the active connections of a linear layer's weight alone."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy import kernels, masks
from rarefy.distributed import cut_by, is_cut
from rarefy.errors import RarefyError
from rarefy.nn import WeightMask, make_compact, show_mask
from rarefy.storage.factor import is_multiple
from rarefy.storage.gradients import DenseGradient
from rarefy.storage.masked import cut_in_pieces, refuse_lost_mask, resized, taken_away
from rarefy.storage.optimizer_state import begin_entries, change_state, make_unrelated_dense, sparse_states
from rarefy.storage.protocol import Carry, checksum
from rarefy.storage.ranking import Score
from rarefy.tensors import SparseWeight, came_through_its_hook, move_entries, set_topology
from rarefy.tensors.topology import Topology
from rarefy.ties import TieOrder
from rarefy.torch_private import attribute, is_part_of_a_flat_parameter


class CompactStorage:
    """A `SparseWeight` as the module's parameter: nothing exists of inactive connections, so there is nothing to zero.

    Args:
        module: holds the weight.
        leaf: attribute name of the weight, which is sparse already.
        mask_leaf: name of the buffer that shows the mask.
        block: outputs and inputs of the blocks in which its masks come, if they do.
    """

    kind = "compact"

    def __init__(
        self, module: nn.Module, leaf: str, mask_leaf: str, block: tuple[int, int] | None = None
    ) -> None:
        self.module = module
        self.leaf = leaf
        self.mask_leaf = mask_leaf
        self.block = block
        self._has_half = False
        # The connections that a plain mask in the place of ours must have; None while any mask is taken.
        self._known: Topology | None = None
        if isinstance(getattr(module, mask_leaf, None), WeightMask):
            self._known = self.weight.topology

    @property
    def form(self) -> str:
        """`block` where whole blocks are stored and multiplied, `half` where tiles are float16, else `compact`."""
        if self._has_half:
            return "half"
        return "block" if self.weight.topology.has_blocks else "compact"

    def take_half(self) -> None:
        """Multiplies in float16 under autocast from now on, whatever the connections will be."""
        self._has_half = True
        cell = self.weight._cell
        if not cell.topology.half:
            cell.topology = cell.topology.in_half()

    @property
    def weight(self) -> Any:
        """The parameter, of the dense weight's shape.

        Raises:
            RarefyError: its connections are lost.
        """
        refuse_lost_mask(self)
        found = attribute(self.module, self.leaf)
        return getattr(self.module, self.leaf) if found is None else found

    @property
    def is_in_place(self) -> bool:
        """Whether the module still has the sparse weight."""
        return isinstance(getattr(self.module, self.leaf, None), SparseWeight)

    def check_in_place(self) -> None:
        """Takes over what somebody assigned, or refuses it."""
        self.restore()

    @property
    def has_lost_mask(self) -> bool:
        """Whether a plain mask with other connections is in the place of the one that shows those of the weight.

        Also where the weight itself was exchanged for a dense tensor, so that there are none to show.
        """
        shown = attribute(self.module, self.mask_leaf)
        if isinstance(shown, WeightMask):
            return not isinstance(shown.weight, SparseWeight)
        if self._known is None or not isinstance(shown, Tensor):
            return False
        # `functional_call` puts other tensors in the place of both, for one call.
        if not isinstance(getattr(self.module, self.leaf, None), nn.Parameter):
            return False
        # Another tool's tensor under the same name is no mask, and is refused elsewhere.
        if shown.dtype != torch.bool or shown.shape != self._known.shape:
            return False
        return shown.is_meta or not torch.equal(self._known.mask().to(shown.device), shown)

    @property
    def shape(self) -> torch.Size:
        """The shape of the weight."""
        return self.weight.shape

    @property
    def entries(self) -> Tensor:
        """The values, [connections]."""
        return self.weight.entries

    @property
    def mask(self) -> Tensor:
        """Built from the indices."""
        return self.weight.topology.mask()

    @property
    def active(self) -> int:
        """The number of values."""
        return self.weight.connections

    @property
    def nonzero(self) -> int:
        """The number of values."""
        return self.active

    @property
    def fingerprint(self) -> int:
        """Of the mask."""
        return checksum(self.mask)

    @property
    def index_bytes(self) -> int:
        """Of both structures, of the weight and of its transpose."""
        return self.weight.topology.index_bytes

    def dense_weight(self) -> Tensor:
        """Built from values and indices."""
        return self.weight.dense()

    def spread(self, entries: Tensor) -> Tensor:
        """Scattered."""
        return entries.dense() if isinstance(entries, SparseWeight) else self.weight.topology.dense(entries)

    def collect(self, dense: Tensor) -> Tensor:
        """Gathered."""
        topology = self.weight.topology
        if isinstance(dense, SparseWeight):
            return dense.entries if dense.topology.equals(topology) else topology.gather(dense.dense())
        return topology.gather(dense)

    def keep_top(self, score: Score, count: int, order: TieOrder) -> Tensor:
        """By the scores of the values alone, unless ties are to be told apart by their places in the weight."""
        scores = score(self.entries)
        kept, may_cut_a_tie = kernels.keep_top_and_tie(scores, count)
        if not may_cut_a_tie:
            return self.spread(kept)
        return masks.drop_lowest(self.mask, self.spread(scores), self.active - count, order)

    def set_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> Carry:
        """Moves values, gradient and optimizer state to the new connections."""
        weight = self.weight
        old = self.weight.topology
        topology = old.with_mask(mask.to(weight.device))
        sources = set_topology(weight, topology)
        self._known = None if self._known is None else topology

        def moved(state: Tensor) -> Tensor:
            if isinstance(state, SparseWeight):
                is_old = state.topology.equals(old)
                return weight.companion(move_entries(state.entries, sources)) if is_old else state
            # Of a state that is dense, only what belongs to connections that stay is carried over.
            stays = old.mask() & mask.to(weight.device)
            return weight.companion(topology.gather(state.masked_fill(~stays, 0)))

        if weight.grad is not None:
            weight.grad = moved(weight.grad)
        change_state(optimizers, weight, weight.shape, moved)
        # After the move, which has filled new places with zeros.
        begin_entries(optimizers, weight, lambda: sources < 0)
        # whatever an optimizer means by it: what is sparse belongs to connections
        for one in sparse_states(optimizers, weight):
            if one.topology.equals(old):
                one._cell.move_to(topology)

        def carry(entries: Tensor, number: float) -> Tensor:
            moved = move_entries(entries, sources)
            return moved if number == 0 else masks.fill_inactive_(moved, sources >= 0, number)

        return carry

    def prune(self, optimizers: Iterable[Optimizer]) -> None:
        """There is nothing at inactive connections; states that mean something else get room for it."""
        make_unrelated_dense(optimizers, self.weight)

    def restore_zeros(self, optimizers: Iterable[Optimizer]) -> bool:
        """Nothing to do."""
        return False

    def select_gradient(self, dense: DenseGradient | None) -> None:
        """Gathers a gradient that somebody assigned dense, and finds the dense one of one assigned sparse."""
        self.restore()
        weight = self.weight
        grad = weight.grad
        if isinstance(grad, SparseWeight) and not grad.topology.equals(weight.topology):
            # That of another weight: as dense as it is there.
            weight.grad = weight.companion(weight.topology.gather(grad.dense()))
        elif isinstance(grad, SparseWeight):
            # What was added to all of it counts where the weight is active.
            grad._cell.inactive = 0
            # Assigned, not accumulated, so nobody paired it: its entries tell whether it was made of the dense
            # one that arrived.
            if dense is not None:
                dense.claim(lambda arrived: is_multiple(grad.entries, weight.topology.gather(arrived)))
        elif grad is not None:
            # Zeros at all inactive positions: what the gradient was made of had been selected.
            if dense is not None and not kernels.holds_zeros(grad, self.mask):
                dense.assign(grad)
            weight.grad = weight.companion(weight.topology.gather(grad.detach()))

    gradient_is_selected = True

    def own_gradient(self) -> None:
        """Nothing to do: what was assigned is gathered into a gradient of its own."""

    def after_accumulation(self, grad: Tensor, dense: DenseGradient | None) -> None:
        """The dense gradient came before, through the hook of the weight.

        Raises:
            RarefyError: it did not.
        """
        weight = self.weight
        if not came_through_its_hook(weight):
            kind = type(self.module).__name__.removeprefix("FSDP")
            raise RarefyError(
                f"{self.leaf} of a {kind} got a gradient past its hooks, which fully_shard, a cleared _backward_hooks "
                "and, below torch 2.10, hooks on saved tensors (torch.utils.checkpoint) take away; use checkpoint(..., "
                "use_reentrant=True), call fully_shard before sparsity.apply(model), or set compute: masked"
            )
        if dense is not None and weight._cell.collect is not None:
            dense.pair()
            dense.seal(grad)

    def carried_gradient(self, grad: Tensor) -> Tensor | None:
        """All of it, dense: what arrives later is that of one micro-batch."""
        entries = self.collect(grad.detach())
        return self.spread(entries) if bool(entries.any()) else None

    def gradient_entries(self) -> Tensor:
        """Those of the gradient themselves."""
        self.select_gradient(None)
        grad = self.weight.grad
        return torch.zeros_like(self.entries) if grad is None else grad.entries

    def set_gradient_entries(self, entries: Tensor) -> None:
        """Written, or made the gradient."""
        weight = self.weight
        if weight.grad is None:
            weight.grad = weight.companion(entries)
        elif entries is not weight.grad.entries:
            weight.grad.entries.copy_(entries)
        # Below the parameter nobody else notices the write.
        weight.grad._cell.written()

    def want_dense_gradient(self, dense: DenseGradient | None) -> None:
        """Has backward passes compute the dense gradient, and give it to `dense`; None to stop."""
        self.weight._cell.collect = None if dense is None else dense.arrive

    # ---- the weight in the module ----

    def take_mask(self, mask: Tensor, optimizers: Iterable[Optimizer]) -> None:
        """Takes the topology of a state dict that is about to be loaded."""
        weight = getattr(self.module, self.leaf)
        if not isinstance(weight, SparseWeight):
            shown = getattr(self.module, self.mask_leaf, None)
            if isinstance(shown, WeightMask):
                shown.dense()  # refuses a weight that was exchanged: nothing tells what its optimizer's state is of
            self._known = None
            return
        # Where the mask was lost, the weight still knows its connections.
        show_mask(self.module, weight, self.mask_leaf)
        if mask.shape != weight.shape:
            return
        wanted = mask.to(weight.device).bool()
        if not torch.equal(wanted, self.mask):
            self.set_mask(wanted, optimizers)

    def after_load(self, optimizers: Iterable[Optimizer]) -> None:
        """Makes a weight compact again that was replaced by a dense one."""
        self.restore()

    def restore(self) -> None:
        """Takes over what somebody assigned to the module in the place of the weight.

        Raises:
            RarefyError: it is neither a plain parameter nor a sparse one, or cut in pieces.
        """
        weight = self.weight
        shown: Any = attribute(self.module, self.mask_leaf)
        # The very class, and the mask of this very weight: loading with assign=True or an assignment puts others
        # there.
        is_ours = type(weight) is SparseWeight and isinstance(shown, WeightMask) and shown.weight is weight
        if is_ours and not is_part_of_a_flat_parameter(weight):
            return
        self._check_that_it_can_be_followed(weight, shown)
        mask = shown.dense() if isinstance(shown, WeightMask) else shown
        make_compact(self.module, self.leaf, mask.to(weight.device), self.mask_leaf, self.block)
        self._known = self.weight.topology
        if self._has_half:
            self.take_half()

    def _check_that_it_can_be_followed(self, weight: Any, shown: Any) -> None:
        cut = cut_by(weight, self.module)
        if is_cut(weight) and not cut:
            kind = type(self.module).__name__.removeprefix("FSDP")
            raise RarefyError(
                f"{self.leaf} of a {kind} has compact storage, which fully_shard cannot cut; set "
                "compute: masked, or call fully_shard before sparsity.apply(model)"
            )
        if cut:
            raise cut_in_pieces(self.module, self.leaf, cut)
        is_own = self.leaf in dict(self.module.named_parameters(recurse=False, remove_duplicate=False))
        if not is_own or not isinstance(shown, Tensor) or shown.dtype != torch.bool:
            raise taken_away(self.module, self.leaf)
        if weight.shape != shown.shape:
            raise resized(self.module, self.leaf, shown.shape)
        if type(weight) not in (nn.Parameter, SparseWeight):
            raise RarefyError(
                f"{self.leaf} of {type(self.module).__name__} is a {type(weight).__name__} now, which compact storage "
                "cannot follow; set compute: masked, or call rarefy.finalize(model) before you wrap or parametrize it"
            )

    # ---- files ----

    def saved_entries(self, tensor: Tensor) -> Tensor:
        """The active entries in row-major order, which does not depend on the machine; a dense tensor as it is."""
        if not isinstance(tensor, SparseWeight):
            return tensor
        return tensor.topology.in_row_major_order(tensor.entries.detach())

    def loaded_entries(self, tensor: Tensor) -> Tensor:
        """Sparse, like the weight."""
        weight = self.weight
        if tensor.shape != weight.shape:
            return weight.companion(weight.topology.from_row_major_order(tensor.to(weight.device)))
        if isinstance(tensor, SparseWeight):
            tensor = tensor.dense()
        return weight.companion(weight.topology.gather(tensor.to(weight.device)))
