"""SynFlow: what each connection contributes to the flow through a network of positive weights; without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.errors import RarefyError
from rarefy.saliency.norms import is_norm, scale_of, unclear
from rarefy.saliency.objective import Objective
from rarefy.saliency.outputs import Change, hooked, is_embedding


class _ReachedOutputError(Exception):
    """Ends a forward pass at the output layer: what comes behind it, a loss, plays no part."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output


def round_sparsity(sparsity: float, turn: int, turns: int) -> float:
    """The sparsity after round `turn` of `turns`; densities fall exponentially (Tanaka et al., arXiv:2006.05467).

    density(k) = density^(k / n)

    Args:
        sparsity: at the end, in [0, 1].
        turn: 1 … turns.
        turns: how many rounds, ≥ 1.

    Example:
        >>> [round(round_sparsity(0.99, turn, 2), 4) for turn in (1, 2)]
        [0.9, 0.99]
    """
    if turn == turns:
        return sparsity
    return 1.0 - (1.0 - sparsity) ** (turn / turns)


class SynapticFlow:
    """The scores of SynFlow: θ ⊙ ∂R/∂θ, where R = 1ᵀ ∏ |θ| 1.

    R is the sum of the output layer's outputs for an input of ones, in float64, where every weight is replaced by its
    magnitude and biases by zeros. For layers that are no linear maps of numbers:

    - an embedding gives ones for every token, so that token inputs are inputs of ones to the first layer behind it;
    - a normalization multiplies with the magnitude of its scale (see `scale_of`), and neither centres nor divides; a
      batch norm divides by the deviation that it has seen, as it does in evaluation;
    - all others (activations, attention's softmax, pooling) are used as they are, in evaluation mode.

    Args:
        model: the module.
        batch: tells the shape of an input; its floating-point tensors are replaced by ones.
        output: the layer whose outputs are summed.
        call: calls the model with a batch.
    """

    def __init__(
        self, model: nn.Module, batch: Any, output: nn.Module, call: Callable[[nn.Module, Any], Any]
    ) -> None:
        self._model = model
        # Of ones all samples are the same, so one is enough.
        self._batch = ones_like(first_sample(batch))
        self._output = output
        self._call = call
        self._objective = Objective(model)
        self._norms = {name for name, module in model.named_modules() if is_norm(module)}

    def scores(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One score a connection, ≥ 0, in float64.

        Args:
            weights: by the names of the model's parameters, zeros at inactive connections; others are the model's own.

        Raises:
            RarefyError: the flow does not depend on a weight, overflows, or the model cannot compute in float64.
        """
        positive = {name: weight.detach().abs().double() for name, weight in weights.items()}
        leaves = {name: weight.requires_grad_() for name, weight in positive.items()}
        with torch.enable_grad(), self._as_flow():
            flow = self._flow(leaves)
            gradients: Sequence[Tensor | None] = [None] * len(leaves)
            if flow.requires_grad:
                gradients = torch.autograd.grad(flow, list(leaves.values()), allow_unused=True)
        if not bool(flow.isfinite()):
            raise RarefyError(
                "synflow: the flow through the network is too large for float64; take snip or topk"
            )
        missing = [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None]
        if missing:
            raise RarefyError(
                f"synflow: the output does not depend on {missing[0]}; leave it out of param_filter"
            )
        return {
            name: weight.detach() * gradient
            for (name, weight), gradient in zip(leaves.items(), gradients, strict=True)
            if gradient is not None
        }

    def _flow(self, weights: Mapping[str, Tensor]) -> Tensor:
        # Of norms with their signs: some scale by 1 + weight.
        own = {
            name: _flowing(name, one, is_signed=name.rpartition(".")[0] in self._norms)
            for name, one in self._model.named_parameters()
        }
        buffers = {name: _wide(one) for name, one in self._objective.buffers().items()}
        try:
            self._objective.run({**own, **buffers, **weights}, self._batch, self._call)
        except _ReachedOutputError as reached:
            return reached.output.sum()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RarefyError(
                f"synflow computes in float64, which this model cannot ({reason}); take snip"
            ) from error
        raise RarefyError("synflow: the output layer was not called; name it with output:")

    @contextmanager
    def _as_flow(self) -> Iterator[None]:
        def stop(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            raise _ReachedOutputError(output)

        changes: dict[nn.Module, Change] = {self._output: stop}
        for name, module in self._model.named_modules():
            if is_embedding(module):
                changes[module] = _gives_ones
            elif name in self._norms:
                changes[module] = partial(_only_scales, name)
        with hooked(changes):
            yield


def ones_like(batch: Any) -> Any:
    """A batch with ones in its floating-point tensors; those of whole numbers, such as tokens, stay.

    Example:
        >>> ones_like({"x": torch.zeros(2), "y": torch.tensor([3])})
        {'x': tensor([1., 1.], dtype=torch.float64), 'y': tensor([3])}
    """
    return mapped(
        lambda one: torch.ones_like(one, dtype=torch.float64) if one.is_floating_point() else one, batch
    )


def first_sample(batch: Any) -> Any:
    """The first sample of a batch, as a batch; the whole where its tensors do not all begin with one same dimension.

    Example:
        >>> first_sample([torch.zeros(4, 3), torch.zeros(4)])[0].shape
        torch.Size([1, 3])
    """
    sizes: set[int] = set()

    def note(one: Tensor) -> Tensor:
        sizes.add(one.shape[0] if one.dim() else 0)
        return one

    mapped(note, batch)
    return mapped(lambda one: one[:1], batch) if len(sizes) == 1 and 0 not in sizes else batch


def mapped(change: Callable[[Tensor], Tensor], batch: Any) -> Any:
    """A batch with every tensor in it changed; mappings, lists and tuples keep their form.

    Example:
        >>> mapped(torch.neg, [torch.ones(1), "text"])
        [tensor([-1.]), 'text']
    """
    if isinstance(batch, Tensor):
        return change(batch)
    if isinstance(batch, Mapping):
        return {key: mapped(change, value) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(mapped(change, value) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(mapped(change, value) for value in batch)
    return batch


def _flowing(name: str, parameter: Tensor, *, is_signed: bool) -> Tensor:
    if "bias" in name.rpartition(".")[2]:
        return _wide(torch.zeros_like(parameter))
    return _wide(parameter.detach() if is_signed else parameter.detach().abs())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _gives_ones(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return torch.ones_like(output, dtype=torch.float64)


def _only_scales(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
    if not inputs:
        raise unclear(name, module)
    return inputs[0] * scale_of(name, module, inputs[0])
