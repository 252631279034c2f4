"""The linear layer of blocks as `torch.library` operations, with shapes for tracing and gradients.

`rarefy::block_linear` and `rarefy::block_linear_backward` take the parts of a `BlockTopology` as separate arguments,
because operations take tensors and numbers only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rarefy.errors import RarefyError
from rarefy.kernels import block_native, blocks, reference
from rarefy.kernels.blocks import BlockTopology
from rarefy.kernels.gpu import block_calls
from rarefy.kernels.linear_gradients import LinearOperations, check_activations, gradient_shapes, tokens_of

_TOPOLOGY = (
    "Tensor starts, Tensor indices, Tensor back_starts, Tensor back_indices, Tensor order, int[] sizes"
)


def block_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, topology: BlockTopology, probe: Tensor | None = None
) -> Tensor:
    """Y = x · Wᵀ + bias with W of blocks; differentiable in x, values and bias.

    Args:
        x: [..., columns]; dtype of values, or bfloat16 or float16 with float32 values.
        values: [blocks, height, width], in the order of `topology`.
        bias: [rows] or None.
        topology: that of W [rows, columns].
        probe: tensor [rows, columns] whose content is never read; its gradient is the dense gradient of W.

    Returns:
        [..., rows] in the dtype of x.

    Raises:
        RarefyError: sizes, dtypes or devices do not fit together.

    Example:
        >>> topology = BlockTopology.from_blocks(torch.tensor([[True, False]]), (1, 2))
        >>> block_linear(torch.tensor([[1.0, 10.0, 5.0, 5.0]]), torch.tensor([[[1.0, 2.0]]]), None, topology)
        tensor([[21.]])
    """
    check_activations(x, topology.columns, values.dtype)
    for name, tensor, shape in (("values", values, topology.values_shape), ("bias", bias, (topology.rows,))):
        if tensor is not None:
            _check(name, tensor, shape, x.device)
    differentiates = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    apply = _OPERATIONS.apply if differentiates else torch.ops.rarefy.block_linear.default
    return apply(x, values, bias, probe, *topology.tensors, topology.sizes)


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if tensor.shape != shape:
        raise RarefyError(f"{name}: shape {tuple(tensor.shape)} is not allowed; give {shape}")
    if tensor.device != device:
        raise RarefyError(f"{name}: {tensor.device} is not allowed with x on {device}; move one of them")


torch.library.define(
    "rarefy::block_linear", f"(Tensor x, Tensor values, Tensor? bias, Tensor? probe, {_TOPOLOGY}) -> Tensor"
)
torch.library.define(
    "rarefy::block_linear_backward",
    f"(Tensor grad, Tensor x, Tensor values, {_TOPOLOGY}, bool[] needs) -> (Tensor, Tensor, Tensor)",
)


@torch.library.impl("rarefy::block_linear", "default")
def _linear(
    x: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None,
    starts: Tensor, indices: Tensor, back_starts: Tensor, back_indices: Tensor, order: Tensor, sizes: list[int],
) -> Tensor:  # fmt: skip
    if block_native.serves(sizes, x, values):
        full_bias = None if bias is None else bias.float().contiguous()
        full = values.float().contiguous()
        return block_native.forward(x.contiguous(), full, full_bias, starts, indices, sizes)
    flat = x.reshape(tokens_of(x), sizes[1])
    if block_calls.serves(x, values):
        y = block_calls.forward(flat, values, bias, starts, indices, sizes)
    else:
        y = reference.forward(flat, blocks.dense(values, starts, indices, sizes), bias)
    return y.view(*x.shape[:-1], sizes[0])


# Shapes for tracing are kernels of the meta device: `register_fake` would search all loaded modules for its caller.
@torch.library.impl("rarefy::block_linear", "Meta")
def _forward_shape(
    x: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None,
    starts: Tensor, indices: Tensor, back_starts: Tensor, back_indices: Tensor, order: Tensor, sizes: list[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], sizes[0])


@torch.library.impl("rarefy::block_linear_backward", "default")
def _backward(
    grad: Tensor, x: Tensor, values: Tensor,
    starts: Tensor, indices: Tensor, back_starts: Tensor, back_indices: Tensor, order: Tensor, sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns, _, _ = sizes
    tokens = tokens_of(x)
    flat_x = x.reshape(tokens, columns)
    flat_grad = grad.to(x.dtype).reshape(tokens, rows)
    if block_native.serves(sizes, x, values):
        transpose = (back_starts, back_indices, order)
        full = values.float().contiguous()
        grads = block_native.backward(
            flat_grad.contiguous(), flat_x.contiguous(), full, transpose, sizes, needs
        )
    elif block_calls.serves(x, values):
        lines = (starts, indices)
        transpose = (back_starts, back_indices, order)
        grads = block_calls.backward(flat_grad, flat_x, values, lines, transpose, sizes, needs)
    else:
        grads = _reference_backward(flat_grad, flat_x, values, starts, indices, sizes)
    grad_x = grads[0].view(x.shape) if needs[0] else x.new_empty(0)
    grad_values = grads[1].to(values.dtype) if needs[1] else values.new_empty(0)
    grad_bias = grads[2].to(values.dtype) if needs[2] else values.new_empty(0)
    return grad_x, grad_values, grad_bias


def _reference_backward(
    grad: Tensor, x: Tensor, values: Tensor, starts: Tensor, indices: Tensor, sizes: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """The three gradients from dense products in plain torch."""
    weight = blocks.dense(values, starts, indices, sizes)
    every = torch.arange(weight.numel(), device=weight.device)
    grad_x, grad_weight, grad_bias = reference.backward(grad, x, weight, every)
    return grad_x, blocks.gather(grad_weight.view(weight.shape), starts, indices, sizes), grad_bias


@torch.library.impl("rarefy::block_linear_backward", "Meta")
def _backward_shape(
    grad: Tensor, x: Tensor, values: Tensor,
    starts: Tensor, indices: Tensor, back_starts: Tensor, back_indices: Tensor, order: Tensor, sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return gradient_shapes(x, values, sizes[0], needs)


_OPERATIONS = LinearOperations(
    torch.ops.rarefy.block_linear.default, torch.ops.rarefy.block_linear_backward.default
)
torch.library.register_autograd(
    "rarefy::block_linear", _OPERATIONS.gradients, setup_context=_OPERATIONS.setup
)


@register_flop_formula(torch.ops.rarefy.block_linear)
def _forward_flops(x: tuple[int, ...], values: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each connection and token."""
    return 2 * math.prod(values) * math.prod(x[:-1])


@register_flop_formula(torch.ops.rarefy.block_linear_backward)
def _backward_flops(
    grad: tuple[int, ...], x: tuple[int, ...], values: tuple[int, ...], *rest: Any, **__: Any
) -> int:
    """The same for the gradient of x and for that of the values."""
    # Last come the needs; the third, the bias, takes additions only.
    return sum(rest[-1][:2]) * 2 * math.prod(values) * math.prod(x[:-1])
