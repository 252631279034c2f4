"""A tensor that becomes another one and stays the same Python object, with the private names that this takes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rarefy.torch_private import without_subclass_functions


def replace_content(tensor: Tensor, new: Tensor) -> None:
    """Makes a leaf what `new` is, of whichever class, shape and dtype; it stays the same Python object.

    `torch.utils.swap_tensors` does the same, but refuses a tensor that a weak reference or a graph knows, and loses
    hooks. Here references go on, hooks are connected again, and a backward pass through an older graph is refused.

    Args:
        tensor: a leaf; its gradient is dropped.
        new: nobody else needs it.

    Example:
        >>> weight = torch.nn.Parameter(torch.ones(2, 2))
        >>> replace_content(weight, torch.nn.Parameter(torch.zeros(3)))
        >>> weight.shape
        torch.Size([3])
    """
    with without_subclass_functions():
        tensor.grad = None
        _refuse_older_graphs(tensor)
        hooks = tensor._backward_hooks
        later = getattr(tensor, "_post_accumulate_grad_hooks", None)
        tensor.__class__, new.__class__ = new.__class__, tensor.__class__
        vars(tensor).update(vars(new))
        vars(new).clear()
        torch._C._swap_tensor_impl(tensor, new)
        # the dicts of hooks stayed with the Python object, but the content inside does not know them yet
        requires_grad = tensor.requires_grad
        tensor.requires_grad_(True)
        if hooks is not None:
            tensor._backward_hooks = hooks
        if later is not None:
            tensor._post_accumulate_grad_hooks = later  # pyright: ignore[reportAttributeAccessIssue]
        tensor.requires_grad_(requires_grad)


def _refuse_older_graphs(tensor: Tensor) -> None:
    """Makes every backward pass through a graph that was built with this leaf an error."""
    torch.autograd.graph.increment_version(tensor)
    if tensor.requires_grad:
        with torch.enable_grad():
            node = torch.autograd.graph.get_gradient_edge(tensor).node
        node.register_prehook(_refuse)


def _refuse(_: Any) -> None:
    raise RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: a weight "
        "changed its storage, dtype or device after the forward pass; compute the loss again"
    )
