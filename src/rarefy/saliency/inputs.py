"""What the layers of a model are given: gathered by hooks while batches run through it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rarefy.distributed import mean_over_ranks, ranks
from rarefy.errors import RarefyError
from rarefy.nn import is_conv1d
from rarefy.roles import Place

_CONVOLUTIONS: Mapping[type[nn.Module], Callable[..., Tensor]] = {
    nn.Conv1d: functional.conv1d,
    nn.Conv2d: functional.conv2d,
    nn.Conv3d: functional.conv3d,
}


def check_watchable(name: str, place: Place, method: str) -> None:
    """Refuses a weight whose inputs cannot be told.

    Raises:
        RarefyError: its module is no linear layer and no convolution.

    Example:
        >>> check_watchable("weight", Place(nn.Linear(2, 2), "weight"), "wanda")
    """
    module = place.module
    remedy = "leave it out of param_filter, or take another method"
    if place.leaf != "weight" or not (is_linear(module) or type(module) in _CONVOLUTIONS):
        kind = type(module).__name__
        raise RarefyError(f"{method} needs the inputs of {name}, which a {kind} does not show; {remedy}")
    if getattr(module, "padding_mode", "zeros") != "zeros":
        raise RarefyError(
            f"{method} cannot tell the padded inputs of {name} (padding_mode is not zeros); {remedy}"
        )


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies the last dimension of its input with a matrix."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


@contextmanager
def watched(
    modules: Iterable[tuple[str, nn.Module]], see: Callable[[str, nn.Module, Tensor], None]
) -> Iterator[None]:
    """Shows the inputs of modules while they are called.

    Args:
        modules: each with a name, which may be that of others too.
        see: called with the name, the module and its first input, detached, before each call.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> with watched([("layer", layer)], lambda name, module, x: print(name, tuple(x.shape))):
        ...     layer(torch.ones(3, 2)).shape
        layer (3, 2)
        torch.Size([3, 1])
    """
    with ExitStack() as stack:
        for name, module in modules:

            def before(
                module: nn.Module, inputs: tuple[Any, ...], keywords: Mapping[str, Any], name: str = name
            ) -> None:
                see(name, module, next(iter(inputs or keywords.values())).detach())

            # Models may give a layer its input by keyword.
            handle = module.register_forward_pre_hook(before, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def input_squares(module: nn.Module, x: Tensor) -> Tensor:
    """Σ x² of what each connection of a layer is multiplied with.

    Args:
        module: a linear layer, Conv1D, or convolution with zeros as padding.
        x: its input.

    Returns:
        float32 or wider, of a shape that broadcasts to that of the layer's weight.

    Example:
        >>> input_squares(nn.Linear(2, 5), torch.tensor([[1.0, 2.0], [3.0, 0.0]]))
        tensor([[10.,  4.]])
        >>> input_squares(nn.Conv1d(1, 4, 2), torch.tensor([[[1.0, 2.0, 3.0]]]))[0]
        tensor([[ 5., 13.]])
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).square()
    if not is_linear(module):
        return _convolution_squares(module, wide)
    sums = wide.flatten(0, -2).sum(0) if wide.dim() > 1 else wide
    return sums.unsqueeze(1) if is_conv1d(module) else sums.unsqueeze(0)


def _convolution_squares(module: Any, squares: Tensor) -> Tensor:
    """The gradient of the sum of outputs: it adds up, for each position of the kernel, what that position sees."""
    groups = module.groups
    inside = module.weight.shape[1:]
    # One output for each group is enough: the outputs of a group see the same.
    kernel = torch.zeros(groups, *inside, dtype=squares.dtype, device=squares.device, requires_grad=True)
    options = (module.stride, module.padding, module.dilation, groups)
    # An input without a batch is one of a batch of one.
    batched = squares if squares.dim() == kernel.dim() else squares.unsqueeze(0)
    with torch.enable_grad():
        total = _CONVOLUTIONS[type(module)](batched, kernel, None, *options).sum()
        (sums,) = torch.autograd.grad(total, kernel)
    return sums.repeat_interleave(module.weight.shape[0] // groups, dim=0)


class SquareSums:
    """Adds up Σ x² for the weights of several modules.

    Args:
        method: the name of who wants it, for messages.
    """

    def __init__(self, method: str) -> None:
        self._method = method
        self._sums: dict[str, Tensor] = {}

    def see(self, name: str, module: nn.Module, x: Tensor) -> None:
        """Adds an input of a module."""
        more = input_squares(module, x).double()
        self._sums[name] = self._sums[name] + more if name in self._sums else more

    def require(self, name: str) -> None:
        """Refuses a weight without sums in this process.

        Raises:
            RarefyError: its module was not called.
        """
        if name not in self._sums:
            remedy = "leave it out of param_filter, or give batches that use it"
            raise RarefyError(f"{self._method} saw no input of {name}; {remedy}")

    def of(self, name: str) -> Tensor:
        """The sums of a weight over all processes.

        Raises:
            RarefyError: its module was not called, or saw something that is not finite.
        """
        self.require(name)
        sums = mean_over_ranks(self._sums[name].clone()) * ranks()
        if not bool(sums.isfinite().all()):
            raise RarefyError(
                f"{self._method} saw an input of {name} that is not finite; look at data and weights"
            )
        return sums
