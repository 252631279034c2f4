"""The private names of torch that training in several processes needs; see `torch_private`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

LEFT_OUT = "_ddp_params_and_buffers_to_ignore"
"""The attribute of a module by which `DistributedDataParallel` learns, while it is built, which names to leave alone.

Without it a sparse weight is exchanged like a dense one, and one in compact storage cannot be trained there.
"""


def ddp_in_forward() -> DistributedDataParallel | None:
    """Whose forward pass is going on; None outside of one.

    Without the name nobody would know in which of several wrappers a weight is used; weights that are left out would
    not be averaged, which is noticed in the first backward pass, and refused.

    Example:
        >>> ddp_in_forward() is None
        True
    """
    return getattr(DistributedDataParallel, "_active_ddp_module", None)


def tolerates_uneven_inputs(ddp: DistributedDataParallel) -> bool:
    """Whether `ddp.join()` is in force, in which processes without data answer what the wrapper asks, and nothing else.

    Without the name the others would wait for those processes in vain.
    """
    config: Any = getattr(ddp, "_join_config", None)
    return bool(getattr(config, "enable", False))


def backward_number() -> int:
    """The number of the backward pass that is going on, −1 outside of one; a checkpoint's has one of its own.

    Without the name nobody could tell whether something was asked for in this backward pass or in one that failed.

    Example:
        >>> backward_number()
        -1
    """
    return torch._C._current_graph_task_id()


def when_backward_ends(callback: Callable[[], None]) -> None:
    """Calls a function at the end of the backward pass that is going on, before `backward()` returns.

    Without the name gradients would have to be averaged before the optimizer's step, when they may be clipped already.

    Example:
        >>> x = torch.ones(1, requires_grad=True)
        >>> handle = x.register_hook(lambda grad: when_backward_ends(lambda: print("over")))
        >>> x.sum().backward()
        over
    """
    torch.autograd.Variable._execution_engine.queue_callback(callback)  # pyright: ignore


outside_of_graphs: Any = torch._disable_dynamo
"""Has a compiler call a function between two graphs; unlike `torch.compiler.disable` it loads the compiler only then.

Without the name compiled models would not see who wraps them, which their first backward pass refuses, and a compiled
step of an optimizer would have updates traced.
"""


def is_managed_by_fully_shard(module: nn.Module) -> bool:
    """Whether `fully_shard` cut the parameters of this very module.

    torch tells which module `fully_shard` was called on, but not which modules inside it were cut; from the first
    forward pass on they have a hook of it that runs before a state dict is made. Without the name a DTensor of somebody
    else would be taken for one whose gradient is a mean.

    Example:
        >>> is_managed_by_fully_shard(nn.Linear(2, 2))
        False
    """
    hooks = module._state_dict_pre_hooks.values()
    return any(getattr(hook, "__module__", "").startswith("torch.distributed.fsdp") for hook in hooks)


def is_distributed_by_hand(module: nn.Module) -> bool:
    """Whether `parallelize_module` or `distribute_module` made the parameters of this module DTensors.

    Without the names a weight of tensor parallelism would be refused only once it has a gradient.

    Example:
        >>> is_distributed_by_hand(nn.Linear(2, 2))
        False
    """
    # torch 2.6 leaves no mark, but the hooks by which inputs become DTensors.
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    has_hooks = any(getattr(hook, "__module__", "") == "torch.distributed.tensor._api" for hook in hooks)
    return has_hooks or bool(getattr(module, "_distribute_module_applied", False))


def end_workers(loader: Any) -> None:
    """Ends the worker processes that a DataLoader keeps from epoch to epoch; anything else is left alone.

    Workers that leave SIGTERM alone would be waited for without end when the interpreter exits. If torch renames these,
    a run with `persistent_workers` hangs at its end, and the test of this function fails.
    """
    iterator = getattr(loader, "_iterator", None)
    if isinstance(iterator, _MultiProcessingDataLoaderIter):
        loader._iterator = None
        iterator._shutdown_workers()
