"""The hooks of sparse weights by which an algorithm learns of their gradients."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from rarefy.errors import RarefyError
from rarefy.storage.parameter import SparseParameter
from rarefy.torch_private import accumulation_hooks, put_first
from rarefy.torch_private.ddp import outside_of_graphs

GradientHook = Callable[[SparseParameter, Tensor], None]
GONE = (
    "a weight learns on after the model is gone in which it was sparse: nothing looks after its zeros or its topology "
    "any longer; keep the model, or call rarefy.finalize(model) before its weights go elsewhere"
)


class WeakHook:
    """A hook of a weight that keeps neither the weight's model nor its algorithm in memory.

    torch holds the hooks of a tensor where Python's collector does not look: what they refer to, and with it the model,
    the optimizer and its states, would stay for as long as the process runs. Hooks of the modules, which the collector
    sees, keep the algorithm as long as there is a model.

    Args:
        call: a method of the algorithm's.
        parameter: the sparse weight.
    """

    def __init__(self, call: GradientHook, parameter: SparseParameter) -> None:
        self._call = weakref.WeakMethod(call)
        self._parameter = weakref.ref(parameter)

    @property
    def parameter(self) -> SparseParameter | None:
        """The sparse weight; None when its model is gone."""
        return self._parameter()

    # A compiled function that has the backward pass in it would have what the algorithm does traced.
    @outside_of_graphs
    def __call__(self, tensor: Tensor) -> None:
        """Passes a gradient, or the weight that has got it, on."""
        call = self._call()
        parameter = self._parameter()
        if call is not None and parameter is not None:
            call(parameter, tensor)
        # Another model may have the weight by now, and may be sparse itself.
        elif isinstance(tensor, nn.Parameter) and not is_watched(tensor):
            warnings.warn(GONE, RuntimeWarning, stacklevel=2)


class GradientHooks:
    """One set of hooks a weight, which goes with it where a module gets another tensor for good.

    Args:
        before: called with each gradient before it is accumulated, if somebody wants that.
        after: called with the weight when its gradient was accumulated.
    """

    def __init__(self, before: GradientHook, after: GradientHook) -> None:
        self._before = before
        self._after = after
        self._watched: dict[str, tuple[nn.Parameter, list[RemovableHandle]]] = {}

    def watch(self, parameter: SparseParameter, with_before: bool) -> None:
        """Hears of the gradients of a weight from now on.

        Args:
            parameter: the weight, new or with another tensor.
            with_before: whether `before` is wanted.
        """
        weight = parameter.weight
        trainable = weight.requires_grad
        # torch registers hooks only where a gradient is wanted, and a frozen weight may be thawed later.
        weight.requires_grad_(True)
        handles = [weight.register_post_accumulate_grad_hook(WeakHook(self._after, parameter))]
        # A hook of before may clip by a norm, in which inactive connections have no part.
        put_first(handles[0])
        if with_before:
            handles.append(weight.register_hook(WeakHook(self._before, parameter)))
        weight.requires_grad_(trainable)
        self._watched[parameter.name] = (weight, handles)

    def find(self, parameter: SparseParameter, with_before: bool) -> None:
        """Follows a parameter that was replaced by another one in its module; else nothing.

        Raises:
            RarefyError: the other one is sparse itself, by this algorithm or another.
        """
        # None where it was taken out of its module, which the next step refuses.
        weight: Any = getattr(parameter, "weight", None)
        # `functional_call` puts other tensors in its place for one call: whose gradients they get is not our affair.
        if weight is self._watched[parameter.name][0] or not isinstance(weight, nn.Parameter):
            return
        refuse_second_mask(parameter, weight)
        self.release(parameter)
        self.watch(parameter, with_before)

    def release(self, parameter: SparseParameter) -> None:
        """Hears no more of it."""
        for handle in self._watched.pop(parameter.name)[1]:
            handle.remove()


def is_watched(weight: nn.Parameter) -> bool:
    """Whether an algorithm selects this weight's gradient, through whichever module it was reached.

    Example:
        >>> is_watched(nn.Linear(2, 2).weight)
        False
    """
    return any(True for _ in _watchers(weight))


def refuse_second_mask(parameter: SparseParameter, weight: nn.Parameter) -> None:
    """Refuses a tensor that was put in a weight's place while it is another sparse weight.

    Args:
        parameter: the weight.
        weight: the tensor that its module has now.

    Raises:
        RarefyError: it is, through whichever algorithm.
    """
    for other in _watchers(weight):
        # Weights that change places were watched for each other, and are no longer.
        if other is not parameter and getattr(other, "weight", None) is weight:
            raise RarefyError(
                f"{other.name} and {parameter.name} are one tensor now, and have two masks; tie weights before "
                "sparsity.apply(model), or leave one of them out of param_filter"
            )


def _watchers(weight: nn.Parameter) -> Iterator[SparseParameter]:
    for hook in accumulation_hooks(weight).values():
        if isinstance(hook, WeakHook) and hook.parameter is not None:
            yield hook.parameter
