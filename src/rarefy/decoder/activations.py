"""The nonlinearities of feed-forward layers by their Model Zoo names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn import functional

Function = Callable[[Tensor], Tensor]


class Activation(nn.Module):
    """A function of one tensor as a module without parameters.

    Args:
        name: a key of `FUNCTIONS`.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, hidden: Tensor) -> Tensor:
        """The function of every entry."""
        return FUNCTIONS[self.name](hidden)

    def extra_repr(self) -> str:
        """The function's name."""
        return self.name


def _quick_gelu(hidden: Tensor) -> Tensor:
    return hidden * torch.sigmoid(1.702 * hidden)


def _tanh_gelu(hidden: Tensor) -> Tensor:
    return functional.gelu(hidden, approximate="tanh")


def _squared_gelu(hidden: Tensor) -> Tensor:
    return functional.gelu(hidden).square()


def _squared_relu(hidden: Tensor) -> Tensor:
    return functional.relu(hidden).square()


def _linear(hidden: Tensor) -> Tensor:
    return hidden


FUNCTIONS: Mapping[str, Function] = MappingProxyType(
    {
        "gelu": functional.gelu,
        "gelu_new": _tanh_gelu,
        "gelu_fast": _tanh_gelu,
        "quick_gelu": _quick_gelu,
        "squared_gelu": _squared_gelu,
        "squared_relu": _squared_relu,
        "relu": functional.relu,
        "relu6": functional.relu6,
        "leaky_relu": functional.leaky_relu,
        "silu": functional.silu,
        "swish": functional.silu,
        "mish": functional.mish,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "linear": _linear,
    }
)
# A gated unit multiplies one linear layer with the function of another.
GATES: Mapping[str, str] = MappingProxyType(
    {"swiglu": "silu", "geglu": "gelu", "geglu_new": "gelu_new", "reglu": "relu", "liglu": "linear"}
)
NONLINEARITIES = (*FUNCTIONS, *GATES)


def activation(name: str) -> nn.Module:
    """The module of a nonlinearity; of a gated unit, that of its gate.

    Example:
        >>> activation("gelu"), activation("swiglu")
        (GELU(approximate='none'), Activation(silu))
    """
    function = GATES.get(name, name)
    return nn.GELU() if function == "gelu" else Activation(function)
