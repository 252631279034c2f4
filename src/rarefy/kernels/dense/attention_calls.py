"""Calls into the compiled attention kernels: bfloat16 with the matrix unit, float32 with vectors."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from rarefy.kernels.instruction_sets import extension, instruction_set_index

# The number that stands for the matrix unit where others stand for instruction sets.
_MATRIX_UNIT = -1


def forward(*heads: Tensor) -> tuple[Tensor, Tensor]:
    """Mixed values [batch, sequence, heads, head size], and what the backward pass takes of each position's softmax.

    Args:
        heads: query, key and value [batch, heads, sequence, head size], all bfloat16 or all float32.

    Example:
        >>> heads = torch.ones(1, 1, 2, 4)
        >>> forward(heads, heads, heads)[0].shape if instruction_set_index() is not None else (1, 2, 1, 4)
        torch.Size([1, 2, 1, 4])
    """
    query, key, value = (_rows(tensor) for tensor in heads)
    samples, number, length, size = query.shape
    mixed = query.new_empty(samples, length, number, size)
    is_narrow = query.dtype == torch.bfloat16
    sizes = (samples, number, length) if is_narrow else (samples, number, length, 2)
    softmax = torch.empty(sizes, dtype=torch.float32, device="cpu")
    module: Any = extension()
    module.attention_forward(
        isa=_number(query),
        shape=_shape(module, query),
        query=_heads(module, query),
        key=_heads(module, key),
        value=_heads(module, value),
        mixed=mixed.data_ptr(),
        softmax=softmax.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return mixed, softmax


def backward(tensors: tuple[Tensor, ...], softmax: Tensor) -> tuple[Tensor, ...]:
    """Gradients, shaped as the heads, from query, key, value, mixed values and their gradient."""
    query, key, value = (_rows(tensor) for tensor in tensors[:3])
    mixed, grad = (_rows(tensor).transpose(1, 2) for tensor in tensors[3:])
    samples, number, length, size = query.shape
    found = [query.new_empty(samples, length, number, size) for _ in range(3)]
    softmax = softmax.contiguous()
    module: Any = extension()
    module.attention_backward(
        isa=_number(query),
        shape=_shape(module, query),
        query=_heads(module, query),
        key=_heads(module, key),
        value=_heads(module, value),
        mixed=_heads(module, mixed),
        grad=_heads(module, grad),
        softmax=softmax.data_ptr(),
        grad_query=found[0].data_ptr(),
        grad_key=found[1].data_ptr(),
        grad_value=found[2].data_ptr(),
        threads=torch.get_num_threads(),
    )
    return tuple(part.transpose(1, 2) for part in found)


def _number(query: Tensor) -> int:
    index = instruction_set_index()
    return _MATRIX_UNIT if query.dtype == torch.bfloat16 or index is None else index


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(3) == 1 else tensor.contiguous()


def _shape(module: Any, query: Tensor) -> Any:
    samples, number, length, size = query.shape
    scale = 1 / math.sqrt(size)
    return module.AttentionShape(samples=samples, heads=number, length=length, size=size, scale=scale)


def _heads(module: Any, heads: Tensor) -> Any:
    """Where [batch, heads, sequence, head size] lies; the address must not outlive the call that it is made for."""
    sample, head, position, _ = heads.stride()
    return module.Heads(data=heads.data_ptr(), sample=sample, position=position, head=head)
