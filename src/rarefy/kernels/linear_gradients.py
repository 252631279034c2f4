"""Gradients of a linear layer whose weight is sparse, for every kind of topology: the same products again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rarefy.errors import RarefyError
from rarefy.kernels import native
from rarefy.kernels.instruction_sets import instruction_set
from rarefy.torch_private import onednn_product

_ONEDNN = onednn_product()
_LARGE = 1 << 23  # multiply-adds


@dataclass(frozen=True)
class LinearOperations:
    """The two operations of a kind of topology, whose parts stand at the end of the arguments.

    Args:
        forward: (x, values, bias, probe, *topology, sizes) → y.
        backward: (grad, x, values, *topology, sizes, needs) → gradients of x, values and bias.
    """

    forward: Callable[..., Tensor]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]

    def apply(self, *inputs: Any) -> Tensor:
        """The forward operation with gradients for `torch.func` transforms too, which do not look into operations."""
        return _Linear.apply(self, *inputs)

    def setup(self, ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps what the gradients need."""
        x, values, bias, probe, *topology, sizes = inputs
        ctx.save_for_backward(x, values, probe, *topology)
        ctx.sizes = sizes
        # Kernels sum up in float32: the gradients of bias and probe go back to what these are.
        ctx.bias_dtype = None if bias is None else bias.dtype
        ctx.probe_dtype = None if probe is None else probe.dtype

    def gradients(self, ctx: Any, grad: Tensor, once_more: bool = False, skipped: int = 0) -> tuple[Any, ...]:
        """The gradients of the inputs.

        Args:
            ctx: as `setup` left it.
            grad: of y.
            once_more: whether they are to be differentiated in their turn.
            skipped: how many inputs stand before x.
        """
        x, values, probe, *topology = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[skipped : skipped + 3])
        backward = partial(_LinearBackward.apply, self, probe) if once_more else self.backward
        found = backward(grad, x, values, *topology, ctx.sizes, needs)
        grad_x, grad_values, grad_bias = (
            g if needed else None for g, needed in zip(found, needs, strict=True)
        )
        if grad_bias is not None:
            grad_bias = grad_bias.to(ctx.bias_dtype)
        grad_probe = None
        if ctx.needs_input_grad[skipped + 3]:
            grad_probe = dense_gradient(grad, x).to(ctx.probe_dtype)
        return grad_x, grad_values, grad_bias, grad_probe, *(None,) * (len(topology) + 1)


class _Linear(torch.autograd.Function):
    """The forward operation of some `LinearOperations`, which come first."""

    @staticmethod
    def forward(operations: LinearOperations, *inputs: Any) -> Tensor:
        return operations.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operations = inputs[0]
        ctx.operations.setup(ctx, inputs[1:], output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        once_more = torch.is_grad_enabled()
        return None, *ctx.operations.gradients(ctx, *grad_outputs, once_more=once_more, skipped=1)


class _LinearBackward(torch.autograd.Function):
    """The gradients, to be differentiated once more; they consist of the same products again."""

    @staticmethod
    def forward(
        operations: LinearOperations, probe: Tensor | None, *inputs: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return operations.backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operations, *tensors, ctx.sizes, ctx.needs = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        probe, grad, x, values, *parts = ctx.saved_tensors
        topology = (*parts, ctx.sizes)
        # What was not asked for in the first place is an empty tensor, and so is its gradient: zeros of the true
        # shape stand for it.
        of_x = grad_outputs[0] if ctx.needs[0] else torch.zeros_like(x)
        of_values = grad_outputs[1] if ctx.needs[1] else torch.zeros_like(values)
        of_bias = grad_outputs[2] if ctx.needs[2] else None
        forward = partial(_Linear.apply, ctx.operations)
        backward = partial(_LinearBackward.apply, ctx.operations, None)
        of_grad = forward(of_x, values, of_bias, probe, *topology) + forward(
            x, of_values, None, None, *topology
        )
        grad_x = backward(grad, x, of_values, *topology, [True, False, False])[0]
        grad_values = backward(grad, of_x, values, *topology, [False, True, False])[1]
        grad_probe = dense_gradient(grad, of_x).to(probe.dtype) if ctx.needs_input_grad[1] else None
        return None, grad_probe, of_grad, grad_x, grad_values, *(None,) * (len(topology) + 1)


def dense_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ · x, both with any number of batch dimensions."""
    grad = grad.reshape(tokens_of(grad), grad.shape[-1])
    x = x.reshape(tokens_of(x), x.shape[-1])
    if _ONEDNN is not None and _onednn_is_faster(grad, x):
        return _ONEDNN(grad.t(), x.t())
    return grad.t() @ x


def _onednn_is_faster(grad: Tensor, x: Tensor) -> bool:
    """For float32 on processors with AVX-512 torch multiplies with MKL, which uses it on some makes only."""
    is_large = grad.numel() * x.shape[1] >= _LARGE and x.is_contiguous()  # other strides take it long
    fits = grad.dtype == x.dtype == torch.float32 and native.serves(grad, x) and native.unwatched(grad, x)
    return is_large and fits and instruction_set() == "v4"


def check_activations(x: Tensor, columns: int, dtype: torch.dtype) -> None:
    """Refuses activations that a weight cannot be multiplied with; the kernels read memory by these sizes.

    Args:
        x: [..., columns].
        columns: inputs of the weight.
        dtype: of its values.

    Raises:
        RarefyError: another number of inputs, or a dtype that does not go with the values.

    Example:
        >>> check_activations(torch.ones(5, 2, dtype=torch.bfloat16), 2, torch.float32)
    """
    if x.dim() == 0 or x.shape[-1] != columns:
        raise RarefyError(f"x: shape {tuple(x.shape)} is not allowed; its last dimension must be {columns}")
    # Half-precision activations go with float32 values, as autocast has it; the kernels widen them.
    if x.dtype is not dtype and not (dtype is torch.float32 and x.dtype in (torch.bfloat16, torch.float16)):
        raise RarefyError(
            f"x: {x.dtype} is not allowed with {dtype} values; convert one, for example x.to({dtype})"
        )


def tokens_of(x: Tensor) -> int:
    """Rows of activations: the product of all dimensions but the last.

    Example:
        >>> tokens_of(torch.ones(2, 3, 5))
        6
    """
    return x.shape[:-1].numel()


def gradient_shapes(
    x: Tensor, values: Tensor, rows: int, needs: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Tensors like the gradients of x, values and bias, empty where one is not needed, for tracing.

    Example:
        >>> [one.shape[0] for one in gradient_shapes(torch.ones(2, 3), torch.ones(4), 5, [True, False, True])]
        [2, 0, 5]
    """
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        values.new_empty(values.shape if needs[1] else (0,)),
        values.new_empty((rows if needs[2] else 0,)),
    )
