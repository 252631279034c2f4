"""The layer that computes what a model puts out, and what is done to its output while a model is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from rarefy.errors import RarefyError, did_you_mean

Change = Callable[[nn.Module, tuple[Any, ...], Any], Any]
"""A forward hook: (module, inputs, output) → another output, or None for the same."""


@contextmanager
def hooked(changes: Mapping[nn.Module, Change]) -> Iterator[None]:
    """Forward hooks on modules, taken off again afterwards.

    Example:
        >>> import torch
        >>> layer = nn.Identity()
        >>> with hooked({layer: lambda module, inputs, output: output * 2}):
        ...     print(layer(torch.ones(1)))
        tensor([2.])
    """
    with ExitStack() as stack:
        for module, change in changes.items():
            stack.callback(module.register_forward_hook(change).remove)
        yield


def output_layer(model: nn.Module, run: Callable[[], Any], name: str | None = None) -> nn.Module:
    """The layer whose output is that of the model: the one that is named, else the last one with a weight matrix.

    Args:
        model: the module.
        run: one forward pass of it.
        name: of a module in it, or None.

    Raises:
        RarefyError: no module of this name, or a forward pass that uses no layer with a weight matrix.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> output_layer(model, lambda: model(torch.ones(1, 2)))
        Linear(in_features=2, out_features=2, bias=True)
    """
    modules = dict(model.named_modules())
    if name is not None:
        if name not in modules:
            raise RarefyError(
                f"output: there is no module {name!r}; give a module ({did_you_mean(name, modules)})"
            )
        return modules[name]
    seen: list[nn.Module] = []

    def note(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(output, Tensor):
            seen.append(module)

    with hooked({module: note for module in modules.values() if _multiplies(module)}):
        run()
    if not seen:
        raise RarefyError(
            "no layer with a weight matrix was called; name the one with output: (example: output: lm_head)"
        )
    # The last that was called, which need not be the last that the model lists.
    return seen[-1]


def _multiplies(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() >= 2 and not is_embedding(module)


def is_embedding(module: nn.Module) -> bool:
    """Whether a module looks rows of its weight up.

    Example:
        >>> is_embedding(nn.Embedding(2, 2)), is_embedding(nn.Linear(2, 2))
        (True, False)
    """
    return isinstance(module, nn.Embedding | nn.EmbeddingBag)


def divided_by(temperature: float) -> Change:
    """Divides what a layer puts out.

    Example:
        >>> import torch
        >>> divided_by(2.0)(nn.Identity(), (), torch.ones(1))
        tensor([0.5000])
    """

    def divide(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return output / temperature

    return divide
