"""The product with a sparse weight as operations that take the weight as one argument, for compilers and modes.

`rarefy::linear` has a gradient, and is taken apart into `rarefy::sparse_linear` or `rarefy::block_linear` on the index
tensors where a compiler sees the parts. `is_transposed` says that the weight is [in, out].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rarefy.kernels import dense_gradient
from rarefy.tensors.stored import StoredWeight

torch.library.define(
    "rarefy::linear", "(Tensor x, Tensor weight, Tensor? bias, bool is_transposed) -> Tensor"
)
torch.library.define(
    "rarefy::linear_backward",
    "(Tensor grad, Tensor x, Tensor weight, bool is_transposed, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
LINEAR = torch.ops.rarefy.linear.default
_BACKWARD = torch.ops.rarefy.linear_backward.default


# ---- with a sparse weight ----


def _sparse_linear(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    x, weight, bias, _ = args
    if not isinstance(weight, StoredWeight) or type(x) is type(weight):
        return NotImplemented
    return weight.topology.index.linear(x, weight.entries, bias)


def _sparse_backward(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    grad, x, weight, _, needs = args
    return gradients(grad, x, weight, needs) if isinstance(weight, StoredWeight) else NotImplemented


def gradients(
    grad: Tensor, x: Tensor, weight: StoredWeight, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, weight and bias; that of the weight dense where that is wanted, else its companion.

    Args:
        grad: [..., out].
        x: [..., in].
        weight: sparse.
        needs: which of the three to compute; the others are of any content.
    """
    wants_dense = needs[1] and weight._cell.collect is not None
    wanted = [needs[0], needs[1] and not wants_dense, needs[2]]
    of_x, of_values, of_bias = weight.topology.index.gradients(grad, x, weight.entries, wanted)
    if wants_dense:
        return of_x, in_layout(dense_gradient(grad.to(x.dtype), x), weight.topology.is_transposed), of_bias
    return of_x, weight.companion(of_values) if needs[1] else of_values, of_bias


def in_layout(matrix: Tensor, is_transposed: bool) -> Tensor:
    """A matrix [out, in] in the layout of the weight."""
    return matrix.t() if is_transposed else matrix


KERNEL_RULES = {LINEAR: _sparse_linear, _BACKWARD: _sparse_backward}


# ---- with a dense weight, and for compilers ----


@torch.library.impl("rarefy::linear", "default")
def _dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    return F.linear(
        x, in_layout(weight, is_transposed).to(x.dtype), bias if bias is None else bias.to(x.dtype)
    )


@torch.library.impl("rarefy::linear_backward", "default")
def _dense_backward(
    grad: Tensor, x: Tensor, weight: Tensor, is_transposed: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    flat = grad.reshape(-1, grad.shape[-1])
    matrix = in_layout(weight, is_transposed).to(grad.dtype)
    of_weight = in_layout(flat.t() @ x.reshape(-1, x.shape[-1]).to(grad.dtype), is_transposed).to(
        weight.dtype
    )
    return (grad @ matrix).to(x.dtype), of_weight.contiguous(), flat.sum(0)


@torch.library.register_fake("rarefy::linear")
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if is_transposed else 0])


@torch.library.register_fake("rarefy::linear_backward")
def _shapes(
    grad: Tensor, x: Tensor, weight: Tensor, is_transposed: bool, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight), grad.new_empty(grad.shape[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.is_transposed = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    found = _BACKWARD(grad, x, weight, ctx.is_transposed, needs)
    of_x, of_weight, of_bias = (one if needed else None for one, needed in zip(found, needs, strict=True))
    return of_x, of_weight, None if of_bias is None else of_bias.to(ctx.bias_dtype), None


torch.library.register_autograd("rarefy::linear", _gradients, setup_context=_setup)


# ---- floating-point operations ----


def _products(x: Tensor, weight: Any) -> int:
    connections = weight.connections if isinstance(weight, StoredWeight) else weight.numel()
    return 2 * connections * math.prod(x.shape[:-1])


@register_flop_formula(torch.ops.rarefy.linear, get_raw=True)
def _forward_flops(x: Tensor, weight: Tensor, *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each connection and token."""
    return _products(x, weight)


@register_flop_formula(torch.ops.rarefy.linear_backward, get_raw=True)
def _backward_flops(
    grad: Tensor, x: Tensor, weight: Tensor, is_transposed: bool, needs: list[bool], **_: Any
) -> int:
    """The same for the gradient of x and for that of the weight, which counts every position where it is dense."""
    is_dense = isinstance(weight, StoredWeight) and weight._cell.collect is not None
    of_weight = 2 * weight.numel() * math.prod(x.shape[:-1]) if is_dense else _products(x, weight)
    return needs[0] * _products(x, weight) + needs[1] * of_weight
