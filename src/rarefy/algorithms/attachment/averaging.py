"""Gradients of sparse weights, averaged over processes: the active entries alone, in any storage.

`DistributedDataParallel` averages gradients in buckets of dense size. It leaves sparse weights alone (`left_out`), and
what it would do for them is done here: at the end of each backward pass in which it would exchange gradients, over the
same processes.
"""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

from rarefy.algorithms.attachment.left_out import OF_A_COPY, leave_out, refuse_copied_wrapper
from rarefy.distributed import Traffic, differing, means_over_ranks
from rarefy.errors import RarefyError, join_path
from rarefy.kernels.instruction_sets import instruction_set, on_intel
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.protocol import checksum
from rarefy.torch_private import leaves
from rarefy.torch_private.ddp import (
    backward_number,
    ddp_in_forward,
    tolerates_uneven_inputs,
    when_backward_ends,
)


class ForwardWatch(Protocol):
    """What tells of forward passes that use a weight."""

    on_forward: Callable[[], None] | None
    is_awaited: bool


class Averaging:
    """Does for the sparse weights of one algorithm what `DistributedDataParallel` does for all others.

    Args:
        parameters: the sparse weights by name; the caller adds to it.
        set_mask: gives a weight the topology of the first process.

    Attributes:
        traffic: what this process gave into exchanges so far.
    """

    def __init__(
        self,
        parameters: Mapping[str, SparseParameter],
        set_mask: Callable[[SparseParameter, Tensor], None],
    ) -> None:
        self.traffic = Traffic()
        self._parameters = parameters
        self._set_mask = set_mask
        self._left: set[str] = set()
        self._watches: dict[str, ForwardWatch] = {}
        self._rounds: weakref.WeakKeyDictionary[DistributedDataParallel, Round] = weakref.WeakKeyDictionary()
        self._round_of: dict[str, Round] = {}
        self._entries: list[RemovableHandle] = []

    def watch(self, keeper: ForwardWatch, parameter: SparseParameter) -> None:
        """Hears of the forward passes that use a weight."""
        keeper.on_forward = partial(self._before_forward, parameter)
        self._watches[parameter.name] = keeper

    # ---- what wrappers are told ----

    def leave_out(self, model: nn.Module) -> None:
        """Lets wrappers of a model that are built from now on leave its sparse weights alone."""
        if dist.is_available():
            leave_out(model, self)

    def leaves(self, model: nn.Module) -> dict[str, str]:
        """The names of sparse weights and masks in a model → the name of the sparse weight here."""
        owners = {one.weight: one for one in self._parameters.values() if one.is_in_place}
        found = {}
        for name, weight in model.named_parameters(remove_duplicate=False):
            if weight in owners:
                owner = owners[weight]
                found[name] = owner.name
                found[join_path(name.rpartition(".")[0], owner.mask_leaf)] = owner.name
        return found

    def left(self, model: nn.Module, owners: Iterable[str]) -> None:
        """Called when a wrapper of a model is built that leaves these weights alone."""
        # In the whole model, since a process may leave out any layer of it in its first pass.
        self._entries.append(model.register_forward_pre_hook(PassHook(self)))
        self._entries.append(model.register_forward_hook(PassHook(self)))
        for name in owners:
            self._left.add(name)
            self._watches[name].is_awaited = True

    def covers(self, parameter: SparseParameter) -> bool:
        """Whether the gradient of a weight is averaged here, so that it may have any storage."""
        return parameter.name in self._left

    def release(self, parameter: SparseParameter) -> None:
        """Forgets a weight; a wrapper that leaves it alone cannot go on."""
        found = self._round_of.pop(parameter.name, None)
        # Its wrapper goes on leaving it alone, so from now on nobody averages it.
        if found is not None and parameter.is_in_place:
            found.lost[parameter.name] = weakref.ref(parameter.weight)
        self._left.discard(parameter.name)
        self._watches.pop(parameter.name, None)
        if not self._left:
            for handle in self._entries:
                handle.remove()
            self._entries.clear()

    # ---- forward and backward passes ----

    def enter(self) -> bool:
        """Called when a forward pass begins, or uses a weight; whether it is that of a wrapper.

        The first one compares the processes, which all have to be here.
        """
        ddp = ddp_in_forward()
        if ddp is None or not torch.is_grad_enabled():
            return False
        found = self._rounds.get(ddp)
        if found is None:
            found = self._begin(ddp)
        if not found.is_compared:
            found.compare(self._set_mask)
        return True

    def leave(self, outputs: Any) -> None:
        """Called when the forward pass of a wrapped model is over; torch calls no hook of its wrapper in the first."""
        ddp = ddp_in_forward()
        found = None if ddp is None else self._rounds.get(ddp)
        if found is not None:
            found.await_backward(outputs)

    def _before_forward(self, parameter: SparseParameter) -> None:
        """Called before a module uses the weight."""
        if self.enter():
            # From now on the wrapper itself says when it is called; compiled passes need not.
            self._watches[parameter.name].is_awaited = False

    def saw_gradient(self, parameter: SparseParameter) -> None:
        """Called when a backward pass accumulated the gradient of a weight.

        Raises:
            RarefyError: nobody would average it.
        """
        found = self._round_of.get(parameter.name)
        if found is not None:
            found.ask()
        elif parameter.name in self._left and not self._rounds:
            raise RarefyError(
                f"{parameter.name} is averaged over the processes by its active entries, and no forward pass of "
                "DistributedDataParallel was seen; call the wrapped model, not its .module"
            )

    def _begin(self, ddp: DistributedDataParallel) -> Round:
        own = self.leaves(ddp.module)
        ignored = {own[name] for name in own if name in ddp.parameters_to_ignore} & self._left
        found = Round(ddp, [one for name, one in self._parameters.items() if name in ignored], self.traffic)
        self._refuse_compact({*own.values()} - ignored)
        # The forward pass of the wrapper has begun already.
        found.before(ddp)
        ddp.register_forward_pre_hook(found.before)
        ddp.register_forward_hook(found.after)
        self._rounds[ddp] = found
        self._round_of |= dict.fromkeys(ignored, found)
        return found

    def _refuse_compact(self, names: Iterable[str]) -> None:
        """Refuses weights in compact storage that the wrapper knows: it averages gradients of dense size.

        Raises:
            RarefyError: there are some.
        """
        stuck = [name for name in names if self._parameters[name].storage.kind == "compact"]
        if stuck:
            raise RarefyError(
                f"{min(stuck)} is in compact storage, and DistributedDataParallel averages it as a dense weight: it "
                "was wrapped before sparsity.apply(model), in a larger module, or nothing else of it learns; call "
                "sparsity.apply on the very module that is wrapped, before it is, or set compute: masked"
            )


class PassHook:
    """The hook of a wrapped model that tells `Averaging` of its forward passes; that of a copy tells nobody."""

    def __init__(self, owner: Averaging | None = None) -> None:
        # Weakly, as the hook lives as long as the model does.
        self._owner = None if owner is None else weakref.ref(owner)

    def __call__(self, model: nn.Module, inputs: Any, *outputs: Any) -> None:
        """Called before a forward pass, and after it with its outputs."""
        # Compiled passes are told of by the wrapper and by the layers.
        if torch.compiler.is_compiling():
            return
        owner = None if self._owner is None else self._owner()
        if owner is None:
            refuse_copied_wrapper(model)
            return
        if outputs:
            owner.leave(outputs)
        else:
            owner.enter()

    def __deepcopy__(self, memo: dict[int, Any]) -> PassHook:
        return PassHook()

    def __reduce__(self) -> Any:
        return PassHook, ()


class Round:
    """One wrapper, and the weights that it leaves to us.

    Args:
        ddp: the wrapper.
        parameters: the weights, in the same order in every process.
        traffic: what is exchanged is added to it.

    Attributes:
        is_compared: whether the processes have the same weights, masks and storage.
        is_copy: whether its wrapper is a copy, which leaves sparse weights alone, and nobody has them.
        lost: weights that nobody averages any more.
    """

    def __init__(
        self, ddp: DistributedDataParallel, parameters: list[SparseParameter], traffic: Traffic
    ) -> None:
        self.is_compared = False
        self.is_copy = False
        self.lost: dict[str, weakref.ref[Tensor]] = {}
        self._parameters = parameters
        self._traffic = traffic
        self._group: Any = ddp.process_group
        self._is_due = False
        self._asked_in = -1

    def before(self, ddp: nn.Module, *_: Any) -> None:
        """Called before each forward pass of the wrapper."""
        assert isinstance(ddp, DistributedDataParallel)
        if not torch.is_grad_enabled():
            return
        if self.is_copy:
            raise RarefyError(OF_A_COPY)
        self._refuse_lost(ddp)
        if self._parameters and tolerates_uneven_inputs(ddp):
            raise RarefyError(
                "ddp.join() is not allowed with sparse weights, whose gradients processes without data would not "
                "exchange; give every process as many batches"
            )
        # False within `no_sync`.
        self._is_due = ddp.require_backward_grad_sync
        self._asked_in = -1

    def _refuse_lost(self, ddp: nn.Module) -> None:
        """Refuses to go on with weights that neither the wrapper nor we average.

        Raises:
            RarefyError: there are some that learn.
        """
        if not self.lost:
            return
        present = set(ddp.parameters())
        for name, reference in self.lost.items():
            weight = reference()
            if weight is not None and weight in present and weight.requires_grad:
                raise RarefyError(
                    f"{name} was sparse when DistributedDataParallel was built, which does not average it therefore; "
                    "build DistributedDataParallel(model) anew after rarefy.finalize(model)"
                )

    def after(self, ddp: nn.Module, inputs: Any, outputs: Any) -> None:
        """Called after each forward pass of the wrapper but the first."""
        if not self.is_copy:
            self.await_backward(outputs)

    def await_backward(self, outputs: Any) -> None:
        """Has a backward pass through any output exchange gradients, whether it reaches a sparse weight or not."""
        for one in leaves(outputs):
            if isinstance(one, Tensor) and one.requires_grad and self._is_due:
                one.register_hook(self._ask_again)

    def _ask_again(self, _: Tensor) -> None:
        # The outermost backward pass, while weights may have been seen in that of a checkpoint already.
        if self._asked_in != backward_number():
            self._ask()

    def ask(self) -> None:
        """Called when a weight has got a gradient."""
        if self._asked_in < 0:
            self._ask()

    def _ask(self) -> None:
        if self._is_due and self._parameters:
            self._asked_in = backward_number()
            when_backward_ends(self._average)

    def __deepcopy__(self, memo: dict[int, Any]) -> Round:
        return copy_of_round()

    def __reduce__(self) -> Any:
        return copy_of_round, ()

    @torch.no_grad()
    def _average(self) -> None:
        self._asked_in = -1
        # As the wrapper does, which ignores backward passes beyond the one that belongs to its forward pass.
        self._is_due = False
        learning = [one for one in self._parameters if one.weight.requires_grad]
        entries = [one.gradient_entries() for one in learning]
        present = [one.weight.grad is not None for one in learning]
        found = means_over_ranks(entries, present, self._group, self._traffic)
        for parameter, means, is_found in zip(learning, entries, found, strict=True):
            if is_found:
                parameter.set_gradient_entries(means)

    # ---- the same weights in every process ----

    @torch.no_grad()
    def compare(self, set_mask: Callable[[SparseParameter, Tensor], None]) -> None:
        """Gives every process weights and masks of the first one, as `DistributedDataParallel` does when it is built.

        Raises:
            RarefyError: the processes store the weights in different ways.
        """
        self.is_compared = True
        if not self._parameters:
            return
        self._refuse_other_storage()
        # torch names the sender by its rank among all processes, not in the group.
        first = dist.get_global_rank(self._group, 0)
        for parameter in self._that_differ():
            mask = parameter.mask.to(torch.uint8)
            dist.broadcast(mask, first, group=self._group)
            if not torch.equal(mask.bool(), parameter.mask):
                set_mask(parameter, mask.bool())
            # What is sent are the numbers of all active connections, those that forward passes leave out among them.
            parameter.show()
            entries = parameter.storage.entries.detach()
            dist.broadcast(entries, first, group=self._group)
            parameter.hide()

    def _that_differ(self) -> list[SparseParameter]:
        sums = {}
        for one in self._parameters:
            sums[one.name] = _sum_of(one)
        found = differing(sums, self._parameters[0].weight.device, self._group)
        return [one for one in self._parameters if one.name in found]

    def _refuse_other_storage(self) -> None:
        """Refuses processes whose entries are in another order than those of the others.

        Raises:
            RarefyError: there are some.
        """
        compact = [one.name for one in self._parameters if one.storage.kind == "compact"]
        # The order of entries follows from how wide panels are, and that from both.
        kernels = f"{instruction_set()}{' on Intel' if on_intel() else ''}"
        facts = {"storage": "\n".join(compact), "kernels": kernels if compact else ""}
        sums = {name: zlib.crc32(text.encode()) for name, text in facts.items()}
        if differing(sums, self._parameters[0].weight.device, self._group):
            raise RarefyError(
                "the processes store sparse weights in different ways: compact storage needs the same kernels in each "
                f"(here: {kernels}); set compute: masked, or RAREFY_KERNELS to one that all have, v3 where only some "
                "processors are Intel's"
            )


def copy_of_round() -> Round:
    """What the hooks of a copied wrapper belong to."""
    found = Round.__new__(Round)
    found.is_copy = True
    return found


def _sum_of(parameter: SparseParameter) -> int:
    """A checksum of mask and weight below 2^63."""
    weight = parameter.true_weight().contiguous().view(torch.uint8)
    return checksum(parameter.mask) + (checksum(weight) % 2**30 << 32)
