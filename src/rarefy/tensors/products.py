"""Products with a sparse weight: `F.linear`, and for a transposed one `addmm` and `matmul`.

They are operations that take the weight as one argument, for compilers and modes: `rarefy::linear` has a gradient, and
is taken apart into `rarefy::sparse_linear` or `rarefy::block_linear` on the index tensors where a compiler sees the
parts. `is_transposed` says that the weight is [in, out].
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from rarefy.errors import RarefyError
from rarefy.kernels import check_activations, dense_gradient
from rarefy.tensors.gradient import ToDense, connect
from rarefy.tensors.stored import Cell, StoredWeight
from rarefy.torch_private import (
    has_forward_gradients,
    has_mode,
    has_transform,
    is_batched,
    without_subclass_functions,
)

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
    # No kernel multiplies two sparse matrices.
    if not isinstance(weight, StoredWeight) or type(x) is type(weight) or weight._cell.is_filled:
        return NotImplemented
    return weight.topology.index.linear(x, weight.entries, bias)


def _sparse_backward(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    grad, x, weight, _, needs = args
    if not isinstance(weight, StoredWeight) or weight._cell.is_filled:
        return NotImplemented
    return gradients(grad, x, weight, needs)


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
    of_x, of_values, of_bias = weight.topology.gradients(grad, x, weight.entries, wanted)
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
    # The dtype of the activations, as under autocast.
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
    # Contiguous, as `_shapes` promises compilers.
    return (grad @ matrix).to(x.dtype), of_weight.contiguous(), flat.sum(0)


# Shapes for tracing are kernels of the meta device: `register_fake` would search all loaded modules for its caller.
@torch.library.impl("rarefy::linear", "Meta")
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, is_transposed: bool) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[1 if is_transposed else 0])


@torch.library.impl("rarefy::linear_backward", "Meta")
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


# With the tensors themselves: of shapes alone nobody could tell how many connections there are.
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


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear` where an argument is a sparse weight."""
    if not isinstance(weight, StoredWeight) or weight._cell.topology.is_transposed or _is_sparse(input):
        # Past `__torch_function__`, which would come here again; the dispatcher still sees the weight.
        with without_subclass_functions():
            return F.linear(input, weight, bias)
    return product(input, weight, bias)


def _inferred(x: Tensor, cell: Cell, bias: Tensor | None) -> Tensor | None:
    """The shortest way, on which a lone token spends as long as in the kernel; None where it may not be taken."""
    if has_forward_gradients():
        return None
    # As torch's own autocast, which leaves float64 alone.
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    cell.forget_snapshot()
    return cell.topology.infer(x, cell.values, bias)


def _is_sparse(x: Any) -> bool:
    return isinstance(x, StoredWeight)


def product(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """X · Mᵀ + bias by the kernels, M [out, in] being the weight, or its transpose if that is stored transposed."""
    is_filled = weight._cell.is_filled
    if not (torch.is_grad_enabled() or torch.compiler.is_compiling() or is_filled):
        y = _inferred(x, weight._cell, bias)
        if y is not None:
            return y
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    is_transposed = weight._cell.topology.is_transposed
    if torch.compiler.is_compiling():
        _refuse_onnx()
        return LINEAR(x, weight, bias, is_transposed)
    if has_transform() or has_forward_gradients() or is_filled:
        return _by_dense(x, weight, bias, is_transposed)
    if torch.jit.is_tracing():
        return _traced(x, weight, bias)
    _check(x, weight._cell, bias)
    # A mode is shown operations alone, and the kernels below are none.
    if has_mode():
        return LINEAR(x, weight, bias, is_transposed)
    if torch.is_grad_enabled():
        # Once a parameter: the hook that gathers its gradient, from the first pass that may need one.
        if "_is_param" in vars(weight) and "_connection" not in vars(weight):
            connect(weight)
        return _Product.apply(x, weight, bias)  # pyright: ignore[reportReturnType]
    return _forward(x, weight, bias)


def _check(x: Tensor, cell: Cell, bias: Tensor | None) -> None:
    """The kernels read memory by these sizes."""
    index = cell.topology.index
    values = cell.values  # asking the weight itself would go through torch
    check_activations(x, index.columns, values.dtype)
    if bias is not None and bias.shape != (index.rows,):
        raise RarefyError(f"bias: shape {tuple(bias.shape)} is not allowed; give ({index.rows},)")
    for name, tensor in (("bias", bias), ("weight", values)):
        if tensor is not None and tensor.device != x.device:
            raise RarefyError(
                f"{name}: {tensor.device} is not allowed with x on {x.device}; move one of them"
            )


def _traced(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    """For TorchScript, which keeps values and indices as constants; ONNX knows no kernels, and gets a dense matrix."""
    if torch.onnx.is_in_onnx_export():
        matrix = in_layout(weight.dense(), weight.topology.is_transposed)
        return F.linear(x, matrix.to(x.dtype), bias if bias is None else bias.to(x.dtype))
    return weight._cell.topology.index.linear(x, weight._cell.values.detach(), bias)


def _refuse_onnx() -> None:
    """ONNX has no operation for the kernels, and torch hands their index tensors to it as parameters.

    Raises:
        RarefyError: a model is exported to ONNX just now.
    """
    if torch.onnx.is_in_onnx_export():
        raise RarefyError(
            "torch.onnx.export of a weight in compact storage is not allowed; export "
            "rarefy.finalize(copy.deepcopy(model)), which has the same weights, or give "
            "rarefy.export.to_onnx(model, inputs, path)"
        )


def _forward(x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
    # Somebody may have looked at an address once; the dense copy behind it must not stay for the whole training.
    cell = weight._cell
    cell.forget_snapshot()
    y = cell.topology.infer(x, cell.values, bias)
    return cell.topology.index.linear(x, cell.values, bias) if y is None else y


def _by_dense(x: Tensor, weight: StoredWeight, bias: Tensor | None, is_transposed: bool) -> Tensor:
    """For transforms and forward-mode gradients, which look into every operation: exact, and dense."""
    with without_subclass_functions():
        # an addition that torch knows, where the method would hide the weight from the transform
        whole = weight + torch.zeros((), dtype=weight.dtype, device=weight.device).expand(weight.shape)
        matrix = in_layout(whole, is_transposed)
        return F.linear(x, matrix.to(x.dtype), bias if bias is None else bias.to(x.dtype))


class _Product(torch.autograd.Function):
    """The product outside of compilers and transforms."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        [grad] = grads
        x, weight = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        # transforms look into every operation, as a second derivative does
        is_watched = torch.is_grad_enabled() or has_transform() or is_batched(grad)
        find = _differentiable_gradients if is_watched else gradients
        found = find(grad, x, weight, needs)
        of_x, of_weight, of_bias = (one if needed else None for one, needed in zip(found, needs, strict=True))
        return of_x, of_weight, None if of_bias is None else of_bias.to(ctx.bias_dtype)


def _differentiable_gradients(
    grad: Tensor, x: Tensor, weight: StoredWeight, needs: list[bool]
) -> tuple[Tensor | None, ...]:
    """The same, to be differentiated once more: dense, by operations that torch knows."""
    is_transposed = weight.topology.is_transposed
    of_x: Tensor | None = None
    of_weight: Tensor | None = None
    of_bias: Tensor | None = None
    flat = grad.reshape(-1, grad.shape[-1])
    if needs[0]:
        whole: Any = ToDense.apply(weight) if torch.is_grad_enabled() else weight.dense()
        of_x = grad @ in_layout(whole, is_transposed).to(grad.dtype)
    if needs[1]:
        of_weight = in_layout(flat.t() @ x.reshape(-1, x.shape[-1]), is_transposed).to(weight.dtype)
    if needs[2]:
        of_bias = flat.sum(0)
    return of_x, of_weight, of_bias


# ---- a transposed weight, as Hugging Face's Conv1D has it ----


def added_product(bias: Tensor, x: Tensor, weight: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """`torch.addmm` with a transposed weight; NotImplemented where the kernels do not compute that."""
    is_vector = isinstance(bias, Tensor) and bias.dim() == 1
    if beta != 1 or alpha != 1 or not is_vector or not _multiplies(x, weight) or x.dim() != 2:
        return NotImplemented
    return product(x, weight, bias)  # pyright: ignore[reportArgumentType]


def matrix_product(x: Tensor, weight: Tensor) -> Any:
    """`x @ weight` with a transposed weight; NotImplemented where the kernels do not compute that."""
    return product(x, weight, None) if _multiplies(x, weight) else NotImplemented  # pyright: ignore


def _multiplies(x: Any, weight: Any) -> bool:
    is_stored = isinstance(weight, StoredWeight) and weight._cell.topology.is_transposed
    return is_stored and isinstance(x, Tensor) and not _is_sparse(x) and x.dim() > 0


PRODUCTS = {
    torch.addmm: added_product,
    Tensor.addmm: added_product,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm), matrix_product),
}
