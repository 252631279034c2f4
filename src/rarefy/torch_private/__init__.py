"""The private names of torch that rarefy uses: each with what it is for, what would break, and a test.

torch may rename any of them in any release. `tests/test_torch_private.py` has a test for each that fails when it does,
and `tests/test_layers.py` finds private names of torch that are used anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.hooks import RemovableHandle

# ---- modules and their hooks ----


def forward_pre_hooks(module: nn.Module) -> Mapping[int, Callable[..., Any]]:
    """The hooks that run before a module's forward pass, by number.

    torch registers hooks but does not list them, and a copy of a module must be asked which hooks it brought along.
    Without the name, sparse weights of a copy would not be found.

    Example:
        >>> len(forward_pre_hooks(nn.Linear(2, 2)))
        0
    """
    return module._forward_pre_hooks


def remove_hooks(module: nn.Module, owner: object) -> None:
    """Removes every hook of a module that is a method of `owner`: before forward, around state_dict, after loading.

    A copy has the hooks, but not the handles that `register_…` returned. Without the names, a model would go on calling
    an algorithm that it no longer has.

    Args:
        module: whose hooks are looked through; not those of the modules in it.
        owner: compared by identity.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> owner = nn.Linear(2, 2)
        >>> _ = layer.register_forward_pre_hook(owner.extra_repr)
        >>> remove_hooks(layer, owner)
        >>> len(forward_pre_hooks(layer))
        0
    """
    registries: tuple[dict[int, Any], ...] = (
        module._forward_pre_hooks,
        module._state_dict_pre_hooks,
        module._state_dict_hooks,
        module._load_state_dict_pre_hooks,
        module._load_state_dict_post_hooks,
    )
    for hooks in registries:
        # torch wraps hooks that come before loading, and keeps what it wrapped.
        own = {key: getattr(hook, "hook", hook) for key, hook in hooks.items()}
        for key in [key for key, hook in own.items() if getattr(hook, "__self__", None) is owner]:
            del hooks[key]
            # torch looks the number up here to decide whether a hook takes keyword arguments
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def buffers_of(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers of a module by name: the dict itself, which a copy of the module has a copy of.

    While a module is copied it cannot be asked for its buffers yet. Without the name, the mask in a copy would be a
    tensor that averages of buffers fail on.

    Example:
        >>> list(buffers_of(nn.BatchNorm1d(2)))
        ['running_mean', 'running_var', 'num_batches_tracked']
    """
    return module._buffers


def parameters_of(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters of a module by name: the dict itself, which a copy of the module has a copy of.

    As with `buffers_of`; without the name, a copy that is made after a step that raised an error would hold what the
    optimizer trains in the place of the weight.

    Example:
        >>> list(parameters_of(nn.Linear(2, 2)))
        ['weight', 'bias']
    """
    return module._parameters


def attribute(module: nn.Module, leaf: str) -> Any:
    """A parameter, a buffer or something else of a module, None without it: `getattr`, in a quarter of the time.

    It is asked for twenty times a layer and step. What hides a parameter from `getattr`, a property or an attribute
    of the instance, it looks past: `refuse_hidden` does not. Without the names small layers would train much slower.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> attribute(layer, "weight") is layer.weight, attribute(layer, "in_features"), attribute(layer, "missing")
        (True, 2, None)
    """
    for own in (module._parameters, module._buffers):
        if leaf in own:
            return own[leaf]
    return getattr(module, leaf, None)


def compiles_its_calls(module: nn.Module) -> bool:
    """Whether `module.compile()` was called. Without the name, counting operations would compile such a model twice.

    Example:
        >>> compiles_its_calls(nn.Linear(2, 2))
        False
    """
    return module._compiled_call_impl is not None


COMPILED_PREFIX = "_orig_mod."
"""What `torch.compile(model)` puts before each name of a state dict; checkpoints of compiled models have it."""


# ---- tensors ----


def times_written(tensor: Tensor) -> int:
    """How often a tensor was written to in place; 0 for an inference tensor, which does not count.

    Tells whether a gradient was touched after its inactive connections were zeroed. Without the name each gradient
    would have to be zeroed twice a step.

    Example:
        >>> times_written(torch.zeros(1).add_(1))
        1
    """
    return 0 if tensor.is_inference() else tensor._version


READS_VERSION: Any = Tensor._version.__get__  # pyright: ignore[reportAttributeAccessIssue]
"""What `__torch_function__` is called with where `times_written` reads it."""


def viewed(tensor: Tensor) -> Tensor:
    """The tensor that a view is of, or the tensor itself.

    A product with a weight transposed is one with the weight. Without the name, its operations would count twice.

    Example:
        >>> weight = torch.ones(2, 3)
        >>> viewed(weight.t()[0]) is weight, viewed(weight) is weight
        (True, True)
    """
    return tensor if tensor._base is None else tensor._base


def accumulation_hooks(tensor: Tensor) -> Mapping[int, Callable[..., Any]]:
    """The hooks that run after a leaf's gradient was accumulated.

    Example:
        >>> len(accumulation_hooks(nn.Linear(2, 2).weight))
        0
    """
    return getattr(tensor, "_post_accumulate_grad_hooks", None) or {}


def put_first(handle: RemovableHandle) -> bool:
    """Has a hook called before those that were registered earlier; returns whether there are any.

    Whatever they do (an average of weights, a norm that is clipped), they find rarefy's part done.
    """
    hooks = handle.hooks_dict_ref()
    assert hooks is not None
    earlier = {key: hook for key, hook in hooks.items() if key != handle.id}
    for key, hook in earlier.items():
        # Put in anew: torch walks through hooks of tensors in C++, which does not see what `move_to_end` does.
        del hooks[key]
        hooks[key] = hook
    return bool(earlier)


def is_part_of_a_flat_parameter(tensor: Tensor) -> bool:
    """Whether `FullyShardedDataParallel` holds this tensor as a part of one of its flat parameters.

    Without the name such a weight would be taken for a whole one, and its mask would be that of another shape.

    Example:
        >>> is_part_of_a_flat_parameter(torch.ones(1))
        False
    """
    return getattr(tensor, "_fsdp_flattened", False)


def multiply_(tensors: list[Tensor], factor: float) -> None:
    """Multiplies many tensors in place, in as few kernels as torch can.

    Public torch has a loop only, which costs a launch a tensor; a gradient that is not unscaled would be wrong.

    Example:
        >>> tensors = [torch.ones(2), torch.ones(1)]
        >>> multiply_(tensors, 3.0)
        >>> tensors
        [tensor([3., 3.]), tensor([3.])]
    """
    torch._foreach_mul_(tensors, factor)


SUBTRACTS_LISTS = torch._foreach_sub
"""How torch's averages take differences of many tensors: always on a GPU, and by `get_swa_multi_avg_fn`.

Without the name an average with buffers would fail on the bool masks in a copy of a sparse model.
"""

ADDS_LISTS = (torch._foreach_add_, torch._foreach_addcdiv_)
"""How they add them, multiplied by `alpha` or divided by a list."""


# ---- operations ----


def softmax_backward(grad: Tensor, output: Tensor) -> Tensor:
    """The gradient of softmax over the last dimension, from that of its output and its output, in their dtype.

    One pass over memory, where public operations need several; attention in bfloat16 would lose part of its gain.

    Example:
        >>> softmax_backward(torch.tensor([1.0, 0.0]), torch.tensor([0.5, 0.5]))
        tensor([ 0.2500, -0.2500])
    """
    return torch._softmax_backward_data(grad, output, -1, output.dtype)


def onednn_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """X · Yᵀ of float32 matrices by oneDNN; None where torch lacks it, and then its own product must do.

    torch gives float32 products to MKL, which leaves AVX-512 unused on some processors. Without the name an update that
    needs dense gradients takes half as long again there.

    Example:
        >>> product = onednn_product()
        >>> product is None or product(torch.ones(1, 2), torch.ones(3, 2)).tolist() == [[2.0, 2.0, 2.0]]
        True
    """
    linear: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return None if linear is None else lambda x, y: linear(x, y, None, "none", [], "")


# ---- optimizers and schedulers ----


def was_told_to_skip(optimizer: optim.Optimizer) -> bool:
    """Whether a fused optimizer was told by a GradScaler to leave everything as it is.

    The scaler calls `step` all the same, with an attribute set on the optimizer. Without the name a step that was not
    taken would count towards the next update.

    Example:
        >>> was_told_to_skip(optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))
        False
    """
    found: Any = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


def scale_in_gradients(optimizer: optim.Optimizer) -> Tensor | None:
    """The factor in the gradients that a fused optimizer takes out by itself, as a GradScaler told it; else None.

    Without the name, what an algorithm sums up over steps would be as large as the scale of the loss.

    Example:
        >>> scale_in_gradients(optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)) is None
        True
    """
    return getattr(optimizer, "grad_scale", None)


def set_progress(scheduler: optim.lr_scheduler.LRScheduler, step: int, rates: Iterable[float]) -> None:
    """Makes a scheduler go on after `step` steps with these rates, without calling it that often.

    Without the names torch would warn that optimizer and scheduler step in the wrong order, and `get_last_lr` would
    tell of another step.

    Example:
        >>> scheduler = optim.lr_scheduler.StepLR(optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1), 1)
        >>> set_progress(scheduler, 7, [0.5])
        >>> scheduler.last_epoch, scheduler.get_last_lr()
        (7, [0.5])
    """
    scheduler.last_epoch = step
    scheduler._step_count = step + 1
    scheduler._last_lr = [*rates]


# ---- who wants to see every operation: modes and transforms; without them a short cut may be taken ----


def private(name: str) -> Callable[[], Any]:
    """A private function of torch that tells whether the dispatcher is needed; where it is missing, it always is.

    Args:
        name: in `torch._C`.

    Example:
        >>> private("_no_such_function")()
        True
    """
    return getattr(torch._C, name, lambda: True)


has_mode = private("_len_torch_dispatch_stack")
has_transform = private("_are_functorch_transforms_active")


def has_memory(tensor: Tensor) -> bool:
    """Whether a plain tensor has its numbers in memory; zeros that torch only makes believe have none.

    Without the name a kernel would read at the address 0.

    Example:
        >>> has_memory(torch.ones(1))
        True
    """
    return not tensor._is_zerotensor()


# ---- tensor subclasses ----

without_subclass_functions: Any = torch._C.DisableTorchFunctionSubclass
"""A context in which a subclass's `__torch_function__` is not asked; its `__torch_dispatch__` still is."""

no_subclass_functions: Any = torch._C._disabled_torch_function_impl
"""The `__torch_function__` of a subclass that has none of its own, and does not want to be asked."""

make_wrapper: Any = torch.Tensor._make_wrapper_subclass  # pyright: ignore[reportAttributeAccessIssue]
"""Makes a tensor of a subclass that has a shape, but no memory of its own."""


def not_compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps the compiler from compiling a function, and what it calls, by itself; its callers may be traced through it.

    Between two graphs, a compiled `__torch_function__` would be called by what it calls; and a backward pass within a
    compiled function would have each operation on a sparse gradient compiled.

    Args:
        function: to be decorated; it stays as it is.

    Example:
        >>> not_compiled(not_compiled) is not_compiled
        True
    """
    frames: Any = torch._C._dynamo.eval_frame  # pyright: ignore[reportAttributeAccessIssue]
    code: Any = function.__code__
    if hasattr(frames, "skip_code"):  # torch 2.6
        frames.skip_code(code)
    else:
        skipped = frames._FrameAction.SKIP
        frames.set_code_exec_strategy(code, frames._FrameExecStrategy(skipped, skipped))
    return function


without_modes: Any = _disable_current_modes
"""A context in which real tensors are computed with, also while a compiler or an exporter traces."""

leaves: Any = tree_leaves
"""What is found in nested lists, tuples and dicts."""

mapped: Any = tree_map
"""The same nested containers with every leaf replaced by what a function makes of it."""


def is_batched(tensor: Tensor) -> bool:
    """Whether a gradient is one of many that `torch.autograd.grad(..., is_grads_batched=True)` computes at once.

    Without the name such a call fails on sparse weights.

    Example:
        >>> is_batched(torch.ones(1))
        False
    """
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return getattr(functorch, "is_legacy_batchedtensor", lambda _: False)(tensor)


def has_forward_gradients() -> bool:
    """Whether forward-mode differentiation is going on.

    Example:
        >>> has_forward_gradients()
        False
    """
    return torch.autograd.forward_ad._current_level >= 0
