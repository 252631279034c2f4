"""The sparse linear layer as `torch.library` operations, with shapes for tracing and gradients.

`rarefy::sparse_linear` and `rarefy::sparse_linear_backward` take the parts of `Panels` as separate arguments, because
operations take tensors and numbers only. `rarefy::zero_inactive_` changes its first argument.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils.flop_counter import register_flop_formula

from rarefy.errors import RarefyError
from rarefy.kernels import half_native, native, reference
from rarefy.kernels.linear_gradients import LinearOperations, check_activations, gradient_shapes, tokens_of
from rarefy.kernels.native import Layout
from rarefy.kernels.panels import Panels

_PANELS = (
    "Tensor starts, Tensor offsets, Tensor back_starts, Tensor back_offsets, Tensor order, SymInt[] sizes"
)


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
    check_activations(x, panels.columns, values.dtype)
    for name, tensor, size in (("values", values, panels.nonzeros), ("bias", bias, panels.rows)):
        if tensor is not None:
            _check(name, tensor, size, x.device)
    # An operation's gradient can neither be differentiated again nor be seen by `torch.func`; a compiler, on the
    # other hand, knows the operation by its schema and not the autograd function.
    differentiates = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    apply = _OPERATIONS.apply if differentiates else torch.ops.rarefy.sparse_linear.default
    return apply(x, values, bias, probe, *panels.tensors, panels.arguments)


def infer(
    x: Tensor, values: Tensor, bias: Tensor | None, layout: Layout, half: bool = False
) -> Tensor | None:
    """What `sparse_linear` returns, by the shortest way, where neither gradients nor anything else has to see it.

    Args:
        x: as `sparse_linear` takes it.
        values: as `sparse_linear` takes them.
        bias: as `sparse_linear` takes it.
        layout: that of the `Panels`, whose making takes as long as a lone token.
        half: whether tiles are float16 where they can be, as `Panels` has it.

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
    y = half_native.forward(x.contiguous(), values, bias, layout) if half else None
    if y is not None:
        return y
    index = native.index_for(x, values)
    if index is None:
        return None
    return native.forward(index, x.contiguous(), values, bias, layout)


def infer_gradients(
    grad: Tensor, x: Tensor, values: Tensor, panels: Panels, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor] | None:
    """What `Panels.gradients` returns, by the shortest way; None where something else has to see the operation.

    Args:
        grad: of y.
        x: as `sparse_linear` took it.
        values: as `sparse_linear` took them.
        panels: the topology.
        needs: which gradients to compute: of x, values and bias.

    Example:
        >>> panels = Panels.from_mask(torch.tensor([[True, False], [True, True]]))
        >>> parts = torch.ones(1, 2), torch.ones(1, 2), torch.ones(3)
        >>> [part.tolist() for part in infer_gradients(*parts, panels, [True, True, True])]
        [[[2.0, 1.0]], [1.0, 1.0, 1.0], [1.0, 1.0]]
    """
    if torch.compiler.is_compiling() or not native.unwatched(grad, x, values):
        return None
    if panels.half or grad.dtype is not x.dtype or not _is_full(values, panels.nonzeros):
        return None
    # Hooks on saved tensors may hand back another x than they were given.
    if not panels.columns or not native.fits(grad, x, panels.rows, panels.columns):
        return None
    if native.index_for(grad, x, values) is None:
        return None
    return native.backward(grad.contiguous(), x.contiguous(), values, panels.back_layout, panels.order, needs)


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
    if torch.compiler.is_compiling() or not (native.serves(tensor) and tensor.is_contiguous()):
        reference.zero_inactive_(tensor, mask)
    # The way through the dispatcher takes longer than the kernel of a small tensor.
    elif mask.is_contiguous() and mask.is_cpu and native.unwatched(tensor, mask):
        native.fill_inactive_(tensor, mask)
        # Autograd refuses to go back through a tensor that was written to since it was saved.
        increment_version(tensor)
    else:
        torch.ops.rarefy.zero_inactive_(tensor, mask)
        increment_version(tensor)
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
    rows, columns, width, _, *half = sizes
    layout = Layout(rows, columns, width, starts, offsets)
    index = native.index_for(x, values)
    if any(half) or index is not None:
        # The kernels read float32, whatever the activations are.
        full_bias = None if bias is None else bias.float().contiguous()
        y = half_native.forward(x.contiguous(), values.contiguous(), full_bias, layout) if any(half) else None
        if y is None and index is not None:
            y = native.forward(index, x.contiguous(), values.float().contiguous(), full_bias, layout)
        if y is not None:
            return y
    positions = reference.positions(*layout)
    flat = x.reshape(tokens_of(x), columns)
    y = reference.forward(flat, reference.dense(rows, columns, positions, values), bias)
    return y.view(*x.shape[:-1], rows)


# Shapes for tracing are kernels of the meta device: `register_fake` would search all loaded modules for its caller.
@torch.library.impl("rarefy::sparse_linear", "Meta")
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
    rows, columns, width, transposed_width, *half = sizes
    tokens = tokens_of(x)
    flat_x, flat_grad = (t.to(x.dtype).reshape(tokens, size) for t, size in ((x, columns), (grad, rows)))
    weight = Layout(rows, columns, width, starts, offsets)
    transposed = Layout(columns, rows, transposed_width, back_starts, back_offsets)
    found = None
    if any(half):
        parts = (flat_grad.contiguous(), flat_x.contiguous(), values.contiguous())
        found = half_native.backward(*parts, transposed, order, needs)
    grads = found or _in_float32(flat_grad, flat_x, values, weight, transposed, order, needs)
    shaped = (grads[0].view(x.shape) if needs[0] else x, grads[1].to(values.dtype), grads[2].to(values.dtype))
    # An operation returns tensors always: what nobody needs is an empty one.
    empty = (x.new_empty(0), values.new_empty(0), values.new_empty(0))
    kept = [g if needed else e for g, e, needed in zip(shaped, empty, needs, strict=True)]
    return kept[0], kept[1], kept[2]


def _in_float32(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    weight: Layout,
    transposed: Layout,
    order: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients by the kernels with tiles in float32, or by plain torch in the dtype of x."""
    if native.serves(x, values) and weight.columns:
        full = values.float().contiguous()
        return native.backward(grad.contiguous(), x.contiguous(), full, transposed, order, needs)
    positions = reference.positions(*weight)
    dense = reference.dense(weight.rows, weight.columns, positions, values)
    return reference.backward(grad, x, dense, positions)


@torch.library.impl("rarefy::sparse_linear_backward", "Meta")
def _backward_shape(
    grad: Tensor, x: Tensor, values: Tensor,
    starts: Tensor, offsets: Tensor, back_starts: Tensor, back_offsets: Tensor, order: Tensor, sizes: list[int],
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return gradient_shapes(x, values, sizes[0], needs)


_OPERATIONS = LinearOperations(
    torch.ops.rarefy.sparse_linear.default, torch.ops.rarefy.sparse_linear_backward.default
)
torch.library.register_autograd(
    "rarefy::sparse_linear", _OPERATIONS.gradients, setup_context=_OPERATIONS.setup
)


@torch.library.impl("rarefy::zero_inactive_", "default")
def _zero(tensor: Tensor, mask: Tensor) -> None:
    # There are lanes of 2, 4 and 8 bytes: float8 has none, and integers go the other way.
    fits = tensor.device.type == "cpu" and tensor.element_size() in (2, 4, 8) and tensor.is_floating_point()
    if fits and tensor.is_contiguous() and native.serves():
        native.fill_inactive_(tensor, mask.contiguous())
    else:
        reference.zero_inactive_(tensor, mask)


@torch.library.impl("rarefy::zero_inactive_", "Meta")
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
    # Last come the needs; the third, the bias, takes additions only.
    return sum(rest[-1][:2]) * 2 * values[0] * math.prod(x[:-1])
