"""Counts the multiplications of a forward pass while it runs, by the weight that they belong to."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from rarefy.models.call import count
from rarefy.torch_private import compiles_its_calls

Counted = tuple[Tensor | None, int]


class ForwardFlops(TorchFunctionMode):
    """While it is entered, adds up floating-point operations; never disturbs what it watches.

    Two operations a multiplication, as usual. Linear layers, convolutions, matrix products and attention are
    counted, element-wise work is not.

    Args:
        model: whose parameters are told apart.

    Attributes:
        by_parameter: operations by parameter name, as if every weight were dense.
        other: operations between activations.

    Example:
        >>> model = nn.Linear(8, 4)
        >>> with ForwardFlops(model) as flops:
        ...     _ = model(torch.ones(2, 8))
        >>> flops.by_parameter
        {'weight': 128}
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._names = {parameter: name for name, parameter in model.named_parameters()}
        self.by_parameter: dict[str, int] = {}
        self.other = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Calls the function, then counts what it did."""
        result = func(*args, **(kwargs or {}))
        for weight, operations in _count(func, args, kwargs or {}, result):
            name = self._names.get(weight) if isinstance(weight, nn.Parameter) else None
            if name is None:
                self.other += operations
            else:
                self.by_parameter[name] = self.by_parameter.get(name, 0) + operations
        return result


def with_unseen(counted: Mapping[str, int], sizes: Mapping[str, int], batch: Any) -> dict[str, int]:
    """Operations by weight; a weight that computes in a way of its own counts as a linear layer.

    Args:
        counted: what was seen, by name of the weight.
        sizes: of all sparse weights, by name.
        batch: that was computed with.

    Example:
        >>> with_unseen({}, {"experts": 10}, torch.ones(3, 2))
        {'experts': 60}
    """
    samples, tokens = count(batch)
    unseen = {name: 2 * size * (tokens or samples) for name, size in sizes.items() if name not in counted}
    return {**counted, **unseen}


def is_compiled(model: nn.Module) -> bool:
    """Whether `torch.compile` has to do with a model; counting would make it compile twice."""
    kinds = (type(module).__name__ for module in model.modules())
    return compiles_its_calls(model) or "OptimizedModule" in kinds


def _count(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> list[Counted]:
    rule = _RULES.get(func)
    if rule is None:
        return []
    try:
        return rule(result, *args, **kwargs)
    # Called in a way that no rule expects: not counted, rather than disturbed.
    except (TypeError, AttributeError, IndexError):
        return []


def _linear(_: Tensor, input: Tensor, weight: Tensor, *__: Any, **___: Any) -> list[Counted]:
    return [(weight, 2 * math.prod(input.shape[:-1]) * weight.numel())]


def _convolution(result: Tensor, input: Tensor, weight: Tensor, *_: Any, **__: Any) -> list[Counted]:
    return [(weight, 2 * result.numel() * math.prod(weight.shape[1:]))]


def _transposed(_: Tensor, input: Tensor, weight: Tensor, *__: Any, **___: Any) -> list[Counted]:
    return [(weight, 2 * input.numel() * math.prod(weight.shape[1:]))]


def _product(result: Tensor, left: Tensor, right: Tensor, *_: Any, **__: Any) -> list[Counted]:
    weight = right if isinstance(right, nn.Parameter) else left
    return [(weight, 2 * result.numel() * left.shape[-1])]


def _added_product(
    result: Tensor, _: Tensor, left: Tensor, right: Tensor, *__: Any, **___: Any
) -> list[Counted]:
    return _product(result, left, right)


def _attention(result: Tensor, query: Tensor, key: Tensor, *_: Any, **__: Any) -> list[Counted]:
    scores = math.prod(query.shape[:-1]) * key.shape[-2]
    return [(None, 2 * scores * (query.shape[-1] + result.shape[-1]))]


def _multi_head(
    result: Any, query: Tensor, key: Tensor, value: Tensor, width: int, heads: int, *rest: Any, **_: Any
) -> list[Counted]:
    """One call of torch's multi-head attention; `rest` begins with in_proj weight and bias."""
    positions = query.numel() // width
    source = key.shape[0]
    weights = [one for one in (rest[0], rest[6]) if one is not None]
    return [
        *((weight, 2 * positions * weight.numel()) for weight in weights),
        (None, 4 * positions * source * width),
    ]


# Within a function that the mode has seen it is off, so what that calls is not counted again.
_RULES: Mapping[Any, Callable[..., list[Counted]]] = {
    F.linear: _linear,
    **dict.fromkeys((F.conv1d, F.conv2d, F.conv3d), _convolution),
    **dict.fromkeys((F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d), _transposed),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), _product),
    **dict.fromkeys((torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), _product),
    **dict.fromkeys((torch.addmm, torch.baddbmm), _added_product),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head,
}
