"""The sparse linear layer as `torch.library` operations, with shapes for tracing and gradients.

`rarefy::sparse_linear` and `rarefy::sparse_linear_backward` take the parts of `Panels` as separate arguments, because
operations take tensors and numbers only. `rarefy::zero_inactive_` changes its first argument.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rarefy.errors import RarefyError
from rarefy.kernels import native, reference
from rarefy.kernels.instruction_sets import instruction_set
from rarefy.kernels.native import Layout
from rarefy.kernels.panels import Panels
from rarefy.torch_private import onednn_product

_PANELS = "Tensor starts, Tensor offsets, Tensor back_starts, Tensor back_offsets, Tensor order, int[] sizes"
_ONEDNN = onednn_product()
_LARGE = 1 << 23  # multiply-adds


def sparse_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, panels: Panels, probe: Tensor | None = None
) -> Tensor:
    """Y = x · Wᵀ + bias with W sparse; differentiable in x, values and bias.

    Args:
        x: [..., columns]; dtype of values, or bfloat16 or float16 with float32 values.
        values: [connections], in the order of `panels`.
        bias: [rows] or None.
        panels: the topology of W [rows, columns].
        probe: tensor [rows, columns] whose content is never read; its gradient is the dense gradient of W.

    Returns:
        [..., rows] in the dtype of x.

    Raises:
        RarefyError: sizes, dtypes or devices do not fit together.

    Example:
        >>> panels = Panels.from_mask(torch.tensor([[True, False], [True, True]]))
        >>> sparse_linear(torch.tensor([[1.0, 10.0]]), torch.tensor([1.0, 2.0, 3.0]), None, panels)
        tensor([[ 1., 32.]])
    """
    if x.dim() == 0 or x.shape[-1] != panels.columns:
        raise RarefyError(
            f"x: shape {tuple(x.shape)} is not allowed; its last dimension must be {panels.columns}"
        )
    half = x.dtype in (torch.bfloat16, torch.float16) and values.dtype == torch.float32
    if x.dtype != values.dtype and not half:
        raise RarefyError(
            f"x: {x.dtype} is not allowed with {values.dtype} values; convert one, for example x.to({values.dtype})"
        )
    for name, tensor, size in (("values", values, panels.nonzeros), ("bias", bias, panels.rows)):
        if tensor is not None:
            _check(name, tensor, size, x.device)
    differentiates = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    apply = _SparseLinear.apply if differentiates else torch.ops.rarefy.sparse_linear.default
    return apply(x, values, bias, probe, *panels.tensors, panels.sizes)


def infer(x: Tensor, values: Tensor, bias: Tensor | None, layout: Layout) -> Tensor | None:
    """What `sparse_linear` returns, by the shortest way, where neither gradients nor anything else has to see it.

    Args:
        x: as `sparse_linear` takes it.
        values: as `sparse_linear` takes them.
        bias: as `sparse_linear` takes it.
        layout: that of the `Panels`, whose making takes as long as a lone token.

    Returns:
        [..., rows]; None where `sparse_linear` must be called.

    Example:
        >>> panels = Panels.from_mask(torch.tensor([[True, False], [True, True]]))
        >>> infer(torch.ones(2, requires_grad=True), torch.ones(3), None, panels.layout) is None
        True
    """
    tensors = (x, values) if bias is None else (x, values, bias)
    if torch.compiler.is_compiling() or not native.unwatched(*tensors):
        return None
    if not x.dim() or x.shape[-1] != layout.columns or not _is_full(values, layout.offsets.numel()):
        return None
    if bias is not None and not (_is_full(bias, layout.rows) and bias.is_cpu):
        return None
    index = native.index_for(x, values)
    if index is None:
        return None
    return native.forward(index, x.contiguous(), values, bias, layout)


def _is_full(tensor: Tensor, size: int) -> bool:
    """Whether a kernel can read this vector."""
    return tensor.dtype is torch.float32 and tensor.numel() == size and tensor.is_contiguous()


def _check(name: str, tensor: Tensor, size: int, device: torch.device) -> None:
    if tensor.shape != (size,):
        raise RarefyError(f"{name}: shape {tuple(tensor.shape)} is not allowed; give ({size},)")
    if tensor.device != device:
        raise RarefyError(f"{name}: {tensor.device} is not allowed with x on {device}; move one of them")


def zero_inactive_(tensor: Tensor, mask: Tensor) -> Tensor:
    """Replaces inactive positions by exact zeros, in place; a NaN there vanishes.

    Args:
        tensor: any shape, device and dtype.
        mask: bool, the shape of the tensor.

    Returns:
        The tensor.

    Raises:
        RarefyError: the mask has another shape or dtype.

    Example:
        >>> zero_inactive_(torch.tensor([1.0, float("nan")]), torch.tensor([True, False]))
        tensor([1., 0.])
    """
    if mask.dtype != torch.bool or mask.shape != tensor.shape:
        given = f"{mask.dtype} with shape {tuple(mask.shape)}"
        raise RarefyError(f"mask: {given} is not allowed; give a bool mask with shape {tuple(tensor.shape)}")
    if native.serves(tensor) and tensor.is_contiguous():
        torch.ops.rarefy.zero_inactive_(tensor, mask)
    else:
        reference.zero_inactive_(tensor, mask)
    return tensor


torch.library.define(
    "rarefy::sparse_linear", f"(Tensor x, Tensor values, Tensor? bias, Tensor? probe, {_PANELS}) -> Tensor"
)
torch.library.define(
    "rarefy::sparse_linear_backward",
    f"(Tensor grad, Tensor x, Tensor values, {_PANELS}, bool[] needs) -> (Tensor, Tensor, Tensor)",
)
torch.library.define("rarefy::zero_inactive_", "(Tensor(a!) tensor, Tensor mask) -> ()")


@torch.library.impl("rarefy::sparse_linear", "default")
def _linear(
    x: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None,
    starts: Tensor, offsets: Tensor, back_starts: Tensor, back_offsets: Tensor, order: Tensor, sizes: list[int],
) -> Tensor:  # fmt: skip
    rows, columns, width, _ = sizes
    index = native.index_for(x, values)
    if index is not None:
        full_bias = None if bias is None else bias.float().contiguous()
        layout = Layout(rows, columns, width, starts, offsets)
        return native.forward(index, x.contiguous(), values.float().contiguous(), full_bias, layout)
    positions = reference.positions(rows, columns, width, starts, offsets)
    flat = x.reshape(_tokens(x), columns)
    y = reference.forward(flat, reference.dense(rows, columns, positions, values), bias)
    return y.view(*x.shape[:-1], rows)


@torch.library.register_fake("rarefy::sparse_linear")
def _forward_shape(
    x: Tensor, values: Tensor, bias: Tensor | None, probe: Tensor | None,
    starts: Tensor, offsets: Tensor, back_starts: Tensor, back_offsets: Tensor, order: Tensor, sizes: list[int],
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], sizes[0])


@torch.library.impl("rarefy::sparse_linear_backward", "default")
def _backward(
    grad: Tensor, x: Tensor, values: Tensor,
    starts: Tensor, offsets: Tensor, back_starts: Tensor, back_offsets: Tensor, order: Tensor, sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    rows, columns, width, transposed_width = sizes
    tokens = _tokens(x)
    flat_x, flat_grad = (t.to(x.dtype).reshape(tokens, size) for t, size in ((x, columns), (grad, rows)))
    if native.serves(x, values) and columns:
        transposed = Layout(columns, rows, transposed_width, back_starts, back_offsets)
        full = values.float().contiguous()
        grads = native.backward(flat_grad.contiguous(), flat_x.contiguous(), full, transposed, order, needs)
    else:
        positions = reference.positions(rows, columns, width, starts, offsets)
        weight = reference.dense(rows, columns, positions, values)
        grads = reference.backward(flat_grad, flat_x, weight, positions)
    shaped = (grads[0].view(x.shape) if needs[0] else x, grads[1].to(values.dtype), grads[2].to(values.dtype))
    empty = (x.new_empty(0), values.new_empty(0), values.new_empty(0))
    kept = [g if needed else e for g, e, needed in zip(shaped, empty, needs, strict=True)]
    return kept[0], kept[1], kept[2]


@torch.library.register_fake("rarefy::sparse_linear_backward")
def _backward_shape(
    grad: Tensor, x: Tensor, values: Tensor,
    starts: Tensor, offsets: Tensor, back_starts: Tensor, back_offsets: Tensor, order: Tensor, sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return (
        x.new_empty(x.shape if needs[0] else (0,)),
        values.new_empty(values.shape if needs[1] else (0,)),
        values.new_empty((sizes[0] if needs[2] else 0,)),
    )


_BACKWARD = torch.ops.rarefy.sparse_linear_backward.default


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, values, bias, probe, *structure, sizes = inputs
    ctx.save_for_backward(x, values, probe, *structure)
    ctx.sizes = sizes
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.probe_dtype = None if probe is None else probe.dtype


def _gradients(ctx: Any, grad: Tensor, once_more: bool = False) -> tuple[Tensor | None, ...]:
    """The gradients; `once_more`: as functions that can be differentiated in their turn."""
    x, values, probe, *structure = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    apply = partial(_SparseLinearBackward.apply, probe) if once_more else _BACKWARD
    found = apply(grad, x, values, *structure, ctx.sizes, needs)
    grad_x, grad_values, grad_bias = (g if needed else None for g, needed in zip(found, needs, strict=True))
    if grad_bias is not None:
        grad_bias = grad_bias.to(ctx.bias_dtype)
    grad_probe = None
    if ctx.needs_input_grad[3]:
        grad_probe = dense_gradient(grad, x).to(ctx.probe_dtype)
    return grad_x, grad_values, grad_bias, grad_probe, *(None,) * (len(structure) + 1)


torch.library.register_autograd("rarefy::sparse_linear", _gradients, setup_context=_setup)


class _SparseLinear(torch.autograd.Function):
    """The same gradients for `torch.func` transforms, which do not look into operations."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        return torch.ops.rarefy.sparse_linear(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _setup(ctx, inputs, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        return _gradients(ctx, *grad_outputs, once_more=torch.is_grad_enabled())


class _SparseLinearBackward(torch.autograd.Function):
    """The gradients, to be differentiated once more; they consist of the same products again."""

    @staticmethod
    def forward(probe: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.rarefy.sparse_linear_backward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        *tensors, ctx.sizes, ctx.needs = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        probe, grad, x, values, *structure = ctx.saved_tensors
        of_x = grad_outputs[0] if ctx.needs[0] else torch.zeros_like(x)
        of_values = grad_outputs[1] if ctx.needs[1] else torch.zeros_like(values)
        of_bias = grad_outputs[2] if ctx.needs[2] else None
        panels = (*structure, ctx.sizes)
        through_x = _SparseLinear.apply(of_x, values, of_bias, probe, *panels)
        through_values = _SparseLinear.apply(x, of_values, None, None, *panels)
        grad_x = _SparseLinearBackward.apply(None, grad, x, of_values, *panels, [True, False, False])[0]
        grad_values = _SparseLinearBackward.apply(None, grad, of_x, values, *panels, [False, True, False])[1]
        grad_probe = dense_gradient(grad, of_x).to(probe.dtype) if ctx.needs_input_grad[0] else None
        return grad_probe, through_x + through_values, grad_x, grad_values, *(None,) * (len(panels) + 1)


@torch.library.impl("rarefy::zero_inactive_", "default")
def _zero(tensor: Tensor, mask: Tensor) -> None:
    fits = tensor.device.type == "cpu" and tensor.element_size() in (2, 4, 8) and tensor.is_floating_point()
    if fits and tensor.is_contiguous() and native.serves():
        native.zero_inactive_(tensor, mask.contiguous())
    else:
        reference.zero_inactive_(tensor, mask)


@torch.library.register_fake("rarefy::zero_inactive_")
def _zero_shape(tensor: Tensor, mask: Tensor) -> None:
    return None


@register_flop_formula(torch.ops.rarefy.sparse_linear)
def _forward_flops(x: tuple[int, ...], values: tuple[int, ...], *_: Any, **__: Any) -> int:
    """A multiplication and an addition for each connection and token."""
    return 2 * values[0] * math.prod(x[:-1])


@register_flop_formula(torch.ops.rarefy.sparse_linear_backward)
def _backward_flops(
    grad: tuple[int, ...], x: tuple[int, ...], values: tuple[int, ...], *rest: Any, **__: Any
) -> int:
    """The same for the gradient of x and for that of the values."""
    return sum(rest[-1][:2]) * 2 * values[0] * math.prod(x[:-1])


def dense_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """gradᵀ · x, both with any number of batch dimensions."""
    grad = grad.reshape(_tokens(grad), grad.shape[-1])
    x = x.reshape(_tokens(x), x.shape[-1])
    if _ONEDNN is not None and _onednn_is_faster(grad, x):
        return _ONEDNN(grad.t(), x.t())
    return grad.t() @ x


def _onednn_is_faster(grad: Tensor, x: Tensor) -> bool:
    """For float32 on processors with AVX-512 torch multiplies with MKL, which uses it on some makes only."""
    is_large = grad.numel() * x.shape[1] >= _LARGE and x.is_contiguous()  # other strides take it long
    fits = grad.dtype == x.dtype == torch.float32 and native.serves(grad, x) and native.unwatched(grad, x)
    return is_large and fits and instruction_set() == "v4"


def _tokens(x: Tensor) -> int:
    return x.shape[:-1].numel()
