"""The nonlinearities by their names in Transformers."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from rarefy.errors import RarefyError

# The decoder's name → theirs. Two names of one function stand in the order in which they are taken on the way back.
PLAIN: Mapping[str, str] = MappingProxyType(
    {
        "gelu": "gelu",
        "gelu_new": "gelu_new",
        "gelu_fast": "gelu_new",
        "quick_gelu": "quick_gelu",
        "squared_relu": "relu2",
        "relu": "relu",
        "relu6": "relu6",
        "leaky_relu": "leaky_relu",
        "silu": "silu",
        "swish": "silu",
        "mish": "mish",
        "sigmoid": "sigmoid",
        "tanh": "tanh",
        "linear": "linear",
    }
)
GATED: Mapping[str, str] = MappingProxyType(
    {"swiglu": "silu", "geglu": "gelu", "geglu_new": "gelu_pytorch_tanh", "reglu": "relu", "liglu": "linear"}
)
# Other names there of the same functions.
_SYNONYMS: Mapping[str, str] = MappingProxyType(
    {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "gelu_python": "gelu", "swish": "silu"}
)


def plain_named(name: str) -> str:
    """The decoder's nonlinearity for an activation.

    Raises:
        RarefyError: the decoder does not have it.

    Example:
        >>> plain_named("gelu_pytorch_tanh"), plain_named("relu2")
        ('gelu_new', 'squared_relu')
    """
    return _named(name, PLAIN)


def gated_named(name: str) -> str:
    """The decoder's gated unit whose gate has an activation.

    Raises:
        RarefyError: the decoder does not have it.

    Example:
        >>> gated_named("silu"), gated_named("gelu_new")
        ('swiglu', 'geglu_new')
    """
    return _named(name, GATED)


def _named(name: str, names: Mapping[str, str]) -> str:
    wanted = _SYNONYMS.get(name, name)
    for here, there in names.items():
        if _SYNONYMS.get(there, there) == wanted:
            return here
    raise RarefyError(
        f"config.json: the activation {name!r} is not allowed; give one of {', '.join(names.values())}"
    )
