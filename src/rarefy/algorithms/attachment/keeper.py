"""The object behind the module hooks of a sparse weight; in a copy of the model it only marks where a mask is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.algorithms.attachment.left_out import take_back
from rarefy.algorithms.attachment.saving import forget_masks
from rarefy.errors import RarefyError, join_path
from rarefy.filters import Candidate
from rarefy.nn import CopiedMask, make_dense
from rarefy.nn.inference_only import marks
from rarefy.storage.parameter import SparseParameter
from rarefy.tensors import SparseWeight
from rarefy.torch_private import buffers_of, forward_pre_hooks, parameters_of, remove_hooks
from rarefy.torch_private.ddp import outside_of_graphs

SCRIPTED = "__prepare_scriptable__"
"""Where `torch.jit.script` looks for what a module wants to be compiled as."""

NO_KEYWORDS: Mapping[str, Any] = MappingProxyType({})


class Keeper:
    """Tells an algorithm what happens to the module of a weight, and lets `finalize` find the mask.

    A copy of the model (deepcopy, pickle, an average of weights) has no algorithm: there the hooks do nothing, and the
    mask is a buffer like others.

    Args:
        module: holds the weight and its mask.
        leaf: attribute name of the weight.
        mask_leaf: attribute name of the mask.
        observe: called with the inputs that the trained model learns from.
        prune: called before the trained model's state dict is made.
        on_load: called after a state dict was loaded into the trained model.
        on_release: called when the model is finalized.
        before_load: called before a state dict is loaded into the trained model, with its mask, or None without one.

    Attributes:
        on_forward: called before the trained model uses the weight, whatever for.
        is_awaited: whether a compiled forward pass has to call it too.
        is_in_step: whether an optimizer is at work, or raised an error while it was: then it has to as well.
        used_weight: for state dicts and copies the weight as forward passes use it, where it holds something else, in
            a step or after one that raised an error; else None.
    """

    def __init__(
        self,
        module: nn.Module,
        leaf: str,
        mask_leaf: str,
        *,
        observe: Callable[[Tensor], None],
        prune: Callable[[], None],
        on_load: Callable[[], None],
        on_release: Callable[[], None],
        before_load: Callable[[Tensor | None], None],
    ) -> None:
        self.module = module
        self.leaf = leaf
        self.mask_leaf = mask_leaf
        self.on_forward: Callable[[], None] | None = None
        self.observe = observe
        self.prune = prune
        self.on_load: Callable[[], None] | None = on_load
        self.on_release: Callable[[], None] | None = on_release
        self.on_load_begins: Callable[[Tensor | None], None] | None = before_load
        self.is_awaited = False
        self.is_in_step = False
        self.used_weight: Callable[[], Tensor | None] | None = None

    @property
    def is_copy(self) -> bool:
        """Whether this object belongs to a copy of the model that was trained."""
        return self.on_load is None

    def __getstate__(self) -> dict[str, Any]:
        own = {"module": self.module, "leaf": self.leaf, "mask_leaf": self.mask_leaf}
        # With the functions a copy of the model would bring copies of the algorithm and of all that it follows.
        nobody = ("on_forward", "observe", "prune", "on_load", "on_release", "on_load_begins", "used_weight")
        return {
            **own,
            **dict.fromkeys(nobody),
            "is_awaited": False,
            "is_in_step": False,
            "buffers": buffers_of(self.module),
            "parameters": parameters_of(self.module),
            "used": None if self.used_weight is None else self.used_weight(),
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The copied module is not complete yet, but its parameters and buffers are.
        buffers = state.pop("buffers", {})
        parameters = state.pop("parameters", {})
        used = state.pop("used", None)
        vars(self).update(state)
        weight = parameters.get(self.leaf)
        # Shared memory is that of the other process's model, which puts it back itself.
        if used is not None and weight is not None and not weight.is_shared():
            weight.data.copy_(used)
        mask = buffers.get(self.mask_leaf)
        if type(mask) is Tensor:
            buffers[self.mask_leaf] = mask.as_subclass(CopiedMask)

    def register(self, modules: Iterable[nn.Module]) -> None:
        """Registers itself with every module that holds the weight."""
        for module in modules:
            module.register_forward_pre_hook(self.before_forward, with_kwargs=True)
            module.register_state_dict_pre_hook(self.before_state_dict)
            module.register_load_state_dict_pre_hook(self.before_load)
            module.register_load_state_dict_post_hook(self.after_load)
            vars(module)[SCRIPTED] = self.refuse_script
            if self.used_weight is not None:
                module.register_state_dict_post_hook(StateDictHook(self))

    def before_forward(
        self, module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any] = NO_KEYWORDS
    ) -> None:
        """Forward pre-hook, called with keyword arguments too, but by tools that move hooks to another module."""
        # In a copy of the model nobody listens.
        if self.on_forward is None:
            return
        # Counting tokens is no part of what is to be compiled.
        if torch.compiler.is_compiling():
            # A compiler looks at both again at each call.
            if self.is_awaited or self.is_in_step:
                self.outside_of_graphs()
            return
        self.on_forward()
        # A pass without gradients trains nothing: one that counts operations, for example.
        # In a trace, which torch compares with a second one, counting would be a part of the first alone.
        if module.training and torch.is_grad_enabled() and not torch.jit.is_tracing():
            x = next(iter(inputs or keywords.values()), None)
            if isinstance(x, Tensor):
                self.observe(x)

    @outside_of_graphs
    def outside_of_graphs(self) -> None:
        """`on_forward`, called between two compiled graphs."""
        if self.on_forward is not None:
            self.on_forward()

    def before_state_dict(self, *_: Any) -> None:
        """State-dict pre-hook: files of a trained model have zeros where its masks have them."""
        weight = getattr(self.module, self.leaf, None)
        # On the meta device there are names and shapes alone.
        if not self.is_copy and not (isinstance(weight, Tensor) and weight.is_meta):
            self.prune()

    def before_load(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Pre-hook of `load_state_dict`."""
        weight = state.get(f"{prefix}{self.leaf}")
        mask = state.get(f"{prefix}{self.mask_leaf}")
        if isinstance(weight, SparseWeight) and not self.is_copy:
            state[f"{prefix}{self.leaf}"] = weight.dense()  # the mask alone says which connections are taken
        if self.on_load_begins is not None:
            self.on_load_begins(mask)

    def after_load(self, *_: Any) -> None:
        """Post-hook of `load_state_dict`."""
        if self.on_load is not None:
            self.on_load()

    def refuse_script(self) -> nn.Module:
        """What torch asks of a module that is about to be compiled to TorchScript.

        Raises:
            RarefyError: always; TorchScript knows neither our hooks nor compact weights.
        """
        raise RarefyError(
            f"torch.jit.script of a model whose {self.leaf} is sparse is not allowed; script "
            "rarefy.finalize(copy.deepcopy(model)), which has the same weights, or use torch.jit.trace or torch.export"
        )

    def release(self) -> None:
        """Makes the weight a plain dense one; once only, where tied modules share this object."""
        if self.on_release is not None:
            self.on_release()
            self.on_release = None
        if self.mask_leaf in dict(self.module.named_buffers(recurse=False, remove_duplicate=False)):
            make_dense(self.module, self.leaf, self.mask_leaf)


class StateDictHook:
    """The hook that a module calls with its state dict; torch marks it by an attribute, which a method cannot have."""

    def __init__(self, keeper: Keeper) -> None:
        self.__self__ = keeper

    def __call__(self, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Within a step, puts what forward passes use in the place of all that the optimizer trains."""
        keeper = self.__self__
        used = None if keeper.used_weight is None else keeper.used_weight()
        if used is not None and prefix + keeper.leaf in state:
            state[prefix + keeper.leaf] = used


def keepers(module: nn.Module) -> Iterator[Keeper]:
    """The objects that look after weights of exactly this module.

    Example:
        >>> list(keepers(nn.Linear(2, 2)))
        []
    """
    for hook in list(forward_pre_hooks(module).values()):
        owner = getattr(hook, "__self__", None)
        if isinstance(owner, Keeper):
            yield owner


def refuse_passed_on(parameter: SparseParameter, present: Iterable[nn.Module]) -> None:
    """Refuses to let go of a weight whose layer is gone from its model, if another layer goes on with it.

    Args:
        parameter: the weight.
        present: the modules of the model.

    Raises:
        RarefyError: one of them has it.
    """
    # The module that is gone may have lost it to the other.
    weight = getattr(parameter, "weight", None)
    for module in present:
        if any(other is weight for other in module.parameters(recurse=False)):
            kind = f"{type(module).__module__}.{type(module).__name__}"
            raise RarefyError(
                f"{parameter.name} was sparse and belongs to another module now, a {kind}, which took its layer's "
                "place (prepare_qat, a wrapper that takes the weights over); exchange modules before "
                "sparsity.apply(model), or after rarefy.finalize(model)"
            )


def warn_of_writes(name: str) -> None:
    """Says that a model is about to be saved with zeros where somebody wrote: it computed with other numbers until now.

    Args:
        name: of the weight.
    """
    warnings.warn(
        f"{name}: something wrote to inactive connections since the last step of the optimizer (a merged adapter, an "
        "average of several topologies); they are zero again, in the state dict and in the model, whose outputs "
        "change; to keep what was written, call rarefy.finalize(model) before the write",
        stacklevel=2,
    )


def forget(module: nn.Module, keeper: Keeper) -> None:
    """Takes all that a keeper registered with a module back.

    Example:
        >>> import rarefy
        >>> layer = nn.Linear(10, 10)
        >>> rarefy.configure(0.9).apply(layer)
        >>> [forget(layer, keeper) for keeper in keepers(layer)], list(keepers(layer))
        ([None], [])
    """
    remove_hooks(module, keeper)
    if getattr(vars(module).get(SCRIPTED), "__self__", None) is keeper:
        del vars(module)[SCRIPTED]


def reclaim(candidate: Candidate) -> None:
    """Takes a weight over from an algorithm that no longer lives, in a copy of its model; the weight becomes dense."""
    for module in dict.fromkeys(place.module for place in candidate.places):
        for stale in [keeper for keeper in keepers(module) if keeper.leaf == candidate.places[0].leaf]:
            forget(module, stale)
            stale.release()
        make_dense(module, candidate.places[0].leaf)


def finalize(model: nn.Module) -> nn.Module:
    """Turns a sparse model back into plain dense modules with exact zeros, without a trace of rarefy.

    A copy without an algorithm keeps what it computes with, and loses its masks.

    Args:
        model: any module, sparse or not; changed in place.

    Returns:
        The same module.

    Raises:
        RarefyError: it is no module.

    Example:
        >>> import rarefy
        >>> layer = nn.Linear(10, 10)
        >>> rarefy.configure(0.9).apply(layer)
        >>> sorted(finalize(layer).state_dict()), int((layer.weight != 0).sum())
        (['bias', 'weight'], 10)
    """
    if not isinstance(model, nn.Module):
        raise RarefyError(f"model: a {type(model).__name__} is not allowed; give the model that is sparse")
    masks = []
    for path, module in model.named_modules():
        for mark in marks(module):
            mark.release(module)
        for keeper in list(keepers(module)):
            forget(module, keeper)
            keeper.release()
            masks.append(join_path(path, keeper.mask_leaf))
        for leaf in [
            leaf for leaf, one in module.named_parameters(recurse=False) if isinstance(one, SparseWeight)
        ]:
            make_dense(module, leaf, f"{leaf}_mask")
    forget_masks(model, masks)
    take_back(model)
    return model
