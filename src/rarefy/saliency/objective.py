"""The loss of a model as a function of some of its weights, evaluated without leaving a trace in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from rarefy.checkpoint import rng
from rarefy.distributed import failing_together, mean_over_ranks
from rarefy.errors import RarefyError
from rarefy.models.call import ModelCall, loss_of

Loss = Callable[[nn.Module, Any], Tensor]
Tensors = Mapping[str, Tensor]
Batches = Sequence[Sequence[Any]]
"""Batches, each in one or more parts whose losses add up to its own."""
Shares = Sequence[Sequence[float]]
"""Factors of the losses of parts, by batch and part: several processes may have more or less of a batch."""

_LOSS = "a function loss(model, batch) that returns a scalar"


def own_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss that the model's own `forward(batch)` returns, as the Trainer calls it.

    Raises:
        RarefyError: the model cannot be called with the batch, or returns no loss.

    Example:
        >>> own_loss(nn.Identity(), torch.tensor([2.0]))
        tensor(2.)
    """
    return loss_of(called(model, batch))


def called(model: nn.Module, batch: Any) -> Any:
    """What the model returns for a batch, as the Trainer calls it.

    Raises:
        RarefyError: the model cannot be called with it.
    """
    try:
        return ModelCall(model)(batch)
    # A model may raise anything on a batch that is not its own.
    except (TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise RarefyError(
            f"the model cannot be called with a batch ({reason}); give loss: {_LOSS}"
        ) from error


class Objective:
    """Evaluates a model with other tensors in the place of its weights.

    Its parameters and their gradients, its buffers (the statistics of batch norms), modes and the random generators
    are afterwards as before: weights and buffers are replaced by copies for the time of a call.

    Args:
        model: the module.
        loss: of (model, batch); a scalar.
        seed: of what the model draws (dropout).
        shares: factors of the losses; None for ones.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> objective = Objective(layer, lambda model, batch: model(batch).sum())
        >>> objective.gradients({"weight": layer.weight}, [[torch.ones(1, 2)]])["weight"].tolist()
        [[1.0, 1.0]]
    """

    def __init__(
        self, model: nn.Module, loss: Loss = own_loss, seed: int = 0, shares: Shares | None = None
    ) -> None:
        self.model = model
        self._shares = shares
        self._loss = loss
        self._seed = seed

    def gradients(self, weights: Tensors, batches: Batches) -> dict[str, Tensor]:
        """The mean gradient of the loss over batches and processes, by weight.

        Args:
            weights: by the names of the model's parameters; floating point.
            batches: at least one; each in parts whose losses add up.

        Returns:
            Tensors of the weights' shapes, float32 or wider.

        Raises:
            RarefyError: the loss is none, or does not depend on a weight, or a gradient is not finite.
        """

        def derive(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
            return torch.autograd.grad(loss, leaves, allow_unused=True)

        return self._mean(weights, batches, derive, "gradient")

    def hessian_products(self, weights: Tensors, vectors: Tensors, batches: Batches) -> dict[str, Tensor]:
        """H · v, where H is the Hessian of the mean loss over batches and processes in all these weights.

        Args:
            weights: by the names of the model's parameters.
            vectors: v, one tensor a weight, of its shape.
            batches: as for `gradients`.

        Raises:
            RarefyError: the loss does not depend on a weight, the model has no second derivatives, or a product is not
                finite.
        """
        names = list(weights)

        def derive(loss: Tensor, leaves: Sequence[Tensor]) -> Sequence[Tensor | None]:
            first = torch.autograd.grad(loss, leaves, create_graph=True, allow_unused=True)
            terms = [
                (gradient * vectors[name].to(gradient.dtype)).sum()
                for name, gradient in zip(names, first, strict=True)
                if gradient is not None and gradient.requires_grad
            ]
            if not terms:
                # Of a loss that is linear in the weights all second derivatives are zero.
                return [torch.zeros_like(leaf) for leaf in leaves]
            self._refuse_ends(terms)
            second = torch.autograd.grad(torch.stack(terms).sum(), leaves, allow_unused=True)
            # A weight in which the loss is linear has a gradient, and a second derivative of zero.
            return [
                torch.zeros_like(leaf) if after is None and before is not None else after
                for leaf, before, after in zip(leaves, first, second, strict=True)
            ]

        try:
            # The fused kernels of attention have no second derivatives.
            with sdpa_kernel(SDPBackend.MATH):
                return self._mean(weights, batches, derive, "Hessian product")
        except RuntimeError as error:
            if "not implemented" not in str(error):
                raise
            raise self._no_second(str(error).splitlines()[0]) from error

    def _no_second(self, reason: str) -> RarefyError:
        return RarefyError(
            f"{type(self.model).__name__} has no second derivatives ({reason}); take snip instead"
        )

    def _refuse_ends(self, gradients: Sequence[Tensor]) -> None:
        """Refuses gradients through a function that can be differentiated only once, past which torch sees nothing."""
        nodes = [gradient.grad_fn for gradient in gradients]
        seen = set(nodes)
        while nodes:
            node = nodes.pop()
            if node is None:
                continue
            if node.name().endswith("::Error"):
                raise self._no_second("one of its functions is marked as once_differentiable")
            new = {following for following, _ in node.next_functions} - seen
            seen |= new
            nodes += new

    def run(self, tensors: Tensors, batch: Any, act: Callable[[nn.Module, Any], Any]) -> Any:
        """Calls `act(model, batch)` with other tensors in the model.

        Args:
            tensors: parameters and buffers by name, which take the place of the model's own.
            batch: handed on.
            act: what to do.

        Returns:
            What it returns.
        """
        # With the buffers too: a forward pass in training mode writes to those of batch norms.
        named = {f"model.{name}": tensor for name, tensor in {**self.buffers(), **tensors}.items()}
        with seeded(self._seed):
            return functional_call(_Acting(self.model), named, (batch, act))

    def buffers(self) -> dict[str, Tensor]:
        """Copies of the model's buffers, which a forward pass may change."""
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def _mean(
        self,
        weights: Tensors,
        batches: Batches,
        derive: Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]],
        what: str,
    ) -> dict[str, Tensor]:
        total: dict[str, Tensor] = {}
        with failing_together(next(iter(weights.values())).device):
            for part, share in self._with_shares(batches):
                for name, gradient in self._derived(weights, part, derive).items():
                    # A sum over batches in half precision would swallow what is small.
                    wide = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32)) * share
                    total[name] = total[name] + wide if name in total else wide
        means = {name: mean_over_ranks(gradient / len(batches)) for name, gradient in total.items()}
        # After the exchange, so that all processes end here; what is not finite would be ranked at random.
        broken = next((name for name, mean in means.items() if not bool(mean.isfinite().all())), None)
        if broken is not None:
            remedy = "look at the data, the weights and the number format"
            raise RarefyError(f"the {what} of {broken} is not finite; {remedy}")
        return means

    def _with_shares(self, batches: Batches) -> Iterator[tuple[Any, float]]:
        shares = self._shares or [[1.0] * len(parts) for parts in batches]
        for parts, own in zip(batches, shares, strict=True):
            yield from zip(parts, own, strict=True)

    def _derived(self, weights: Tensors, batch: Any, derive: Any) -> dict[str, Tensor]:
        leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}

        def act(model: nn.Module, given: Any) -> Sequence[Tensor | None]:
            # The backward pass too while the copies are in place: checkpointed parts run once more in it.
            return derive(self._scalar(model, given), list(leaves.values()))

        with torch.enable_grad():
            found = self.run(leaves, batch, act)
        unused = [name for name, gradient in zip(leaves, found, strict=True) if gradient is None]
        if unused:
            remedy = "leave it out of param_filter, or give batches that use it"
            raise RarefyError(f"the loss does not depend on {unused[0]}; {remedy}")
        return dict(zip(leaves, found, strict=True))

    def _scalar(self, model: nn.Module, batch: Any) -> Tensor:
        loss = self._loss(model, batch)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise RarefyError(f"the loss is {got}; give loss: {_LOSS}")
        if not loss.requires_grad:
            raise RarefyError(
                f"the loss has no gradient; give loss: {_LOSS}, made of what the model computes"
            )
        return loss.reshape(())


class _Acting(nn.Module):
    """Does something with a model inside its `forward`, which is where torch puts other tensors in place."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, act: Callable[[nn.Module, Any], Any]) -> Any:
        return act(self.model, batch)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Torch's generators start from a seed; afterwards all random generators are as before.

    Example:
        >>> with seeded(3):
        ...     first = torch.rand(1)
        >>> with seeded(3):
        ...     print(bool(first == torch.rand(1)))
        True
    """
    states = rng.capture()
    torch.manual_seed(seed)
    try:
        yield
    finally:
        rng.restore(states)


@contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Every module in training or evaluation mode, None leaves them; afterwards each is in its own again.

    Example:
        >>> layer = nn.Dropout()
        >>> with in_mode(layer, False):
        ...     print(layer.training)
        False
    """
    modes = [(module, module.training) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
