"""What a normalization multiplies with, once it neither centres nor divides."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
_BY_CHANNEL = (*_BATCH_NORMS, *_INSTANCE_NORMS, nn.GroupNorm)
_OF_TORCH = (*_BY_CHANNEL, nn.LayerNorm, nn.RMSNorm)
# By the function, since a subclass may compute something else.
_KNOWN = frozenset(kind.forward for kind in _OF_TORCH)
# Some compute in bfloat16; of what is this near, the nearer is taken.
_NEAR = 0.02


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a normalization: one of torch's, or by the name of its class.

    Example:
        >>> is_norm(nn.LayerNorm(2)), is_norm(nn.Linear(2, 2))
        (True, False)
    """
    is_named = "norm" in type(module).__name__.lower() and not list(module.children())
    return is_named or isinstance(module, _OF_TORCH)


def scale_of(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """The magnitude of what a normalization multiplies its input with.

    |weight| / √(σ² + ε), with the variance σ² that a batch norm has seen, else without. Of norms that are not torch's
    own, what they make of a random input tells whether they scale by weight or by 1 + weight.

    Args:
        name: of the module, for messages.
        module: a normalization, its bias zero.
        x: its input.

    Returns:
        float64, of a shape that broadcasts to that of `x`.

    Raises:
        RarefyError: a norm that does neither.

    Example:
        >>> scale_of("norm", nn.LayerNorm(2, bias=False), torch.ones(1, 2)).tolist()
        [1.0, 1.0]
    """
    weight: Any = getattr(module, "weight", None)
    variance: Any = getattr(module, "running_var", None)
    if type(module).forward not in _KNOWN and (weight is not None or any(True for _ in module.parameters())):
        weight = weight_or_more(name, module, x)
    factor = torch.ones((), dtype=torch.float64, device=x.device) if weight is None else weight.double().abs()
    if variance is not None:
        factor = factor / (variance + getattr(module, "eps", 0.0)).sqrt()
    # Batch, instance and group norms scale channels, in dimension 1; the others what comes last.
    is_by_channel = isinstance(module, _BY_CHANNEL) and factor.dim() > 0
    return factor.view(-1, *[1] * (x.dim() - 2)) if is_by_channel else factor


def weight_or_more(name: str, module: nn.Module, x: Tensor) -> Tensor:
    """By which of weight and 1 + weight a module scales what it normalizes in the last dimension.

    Args:
        name: of the module, for messages.
        module: a normalization, its bias zero.
        x: tells the shape, dtype and device of an input.

    Raises:
        RarefyError: by neither.
    """
    weight: Any = getattr(module, "weight", None)
    takes_more = len(inspect.signature(module.forward).parameters) != 1
    if takes_more or not isinstance(weight, Tensor) or weight.shape != x.shape[-1:]:
        raise unclear(name, module)
    draws = torch.Generator().manual_seed(0)
    given = torch.randn(x.shape, generator=draws, dtype=torch.float64).to(x)
    # Not by calling the module, whose hooks are what asks.
    scales = (weight, 1.0 + weight)
    with torch.no_grad():
        found = module.forward(given)
        gaps = [_gap(found, [one * scale for one in _normal(given)]) for scale in scales]
    if min(gaps) > _NEAR * (1.0 + float(weight.detach().abs().max())):
        raise unclear(name, module)
    return scales[gaps.index(min(gaps))]


def unclear(name: str, module: nn.Module) -> RarefyError:
    """What is said of a normalization that does something else."""
    kind = type(module).__name__
    return RarefyError(f"synflow cannot tell what {name}, a {kind}, multiplies with; take snip")


def _normal(x: Tensor) -> Iterator[Tensor]:
    """Divided by the root of the mean square, and centred before."""
    for one in (x, x - x.mean(-1, keepdim=True)):
        yield one * one.square().mean(-1, keepdim=True).rsqrt()


def _gap(found: Any, expected: Iterable[Tensor]) -> float:
    """How far something is from the nearest of what it may be; ∞ where it cannot be compared."""
    shape = getattr(found, "shape", None)
    near = [float((found - one).abs().max().nan_to_num(torch.inf)) for one in expected if one.shape == shape]
    return min(near, default=torch.inf)
