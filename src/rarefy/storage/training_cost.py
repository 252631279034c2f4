"""What training needs: floating-point operations and bytes, of sparse weights and of their dense twins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from rarefy.storage.optimizer_state import entries, stored_numbers
from rarefy.storage.parameter import SparseParameter

# Of an update, at each position: one makes the score, one compares it.
PER_POSITION = 2
# Of the products of a training step: forward, gradient of the inputs, gradient of the weight.
PRODUCTS = 3


@dataclass(frozen=True)
class Cost:
    """An amount, and that of the same model with every weight dense.

    Args:
        sparse: what is really needed.
        dense: what the dense twin would need.

    Example:
        >>> Cost(1, 4) + Cost(2, 4)
        Cost(sparse=3, dense=8)
    """

    sparse: int = 0
    dense: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.sparse + other.sparse, self.dense + other.dense)


@dataclass(frozen=True)
class Memory:
    """Bytes of what is kept from one training step to the next.

    Args:
        weights: of the model, masks and indices among the sparse ones.
        gradients: one for each weight that is trained; the dense gradient of a coming update is not among them.
        states: of the optimizers, and of a method that keeps numbers for each connection.
    """

    weights: Cost = Cost()
    gradients: Cost = Cost()
    states: Cost = Cost()

    def __add__(self, other: Memory) -> Memory:
        return Memory(
            self.weights + other.weights, self.gradients + other.gradients, self.states + other.states
        )

    @property
    def total(self) -> Cost:
        """All of it."""
        return self.weights + self.gradients + self.states


def step_operations(forward: int, size: int, used: int, active: int) -> int:
    """Operations of one forward and one backward pass through a sparse weight.

    forward · (used + used + active) / size: the products of the forward pass and of the gradient of the inputs take the
    connections that forward passes use, that of the gradient of the weight takes the active ones.

    Args:
        forward: operations of the forward pass with a dense weight.
        size: positions of the weight.
        used: connections that forward passes use.
        active: connections that get a gradient: all positions, where the dense gradient is collected.

    Example:
        >>> step_operations(800, 100, used=10, active=10), step_operations(800, 100, used=10, active=100)
        (240, 960)
    """
    return forward * ((PRODUCTS - 1) * used + active) // max(size, 1)


def used_by(parameter: SparseParameter) -> int:
    """How many connections forward passes use."""
    hidden = parameter.forward.hidden
    return parameter.active - (0 if hidden is None else int(parameter.storage.spread(hidden).count_nonzero()))


def operations_of(parameters: Iterable[SparseParameter], is_collected: bool = False) -> Cost:
    """Operations of a training step on sparse weights alone, for each row of activations that they multiply.

    Args:
        parameters: the weights.
        is_collected: whether the step collects the dense gradient.
    """
    total = Cost()
    for one in parameters:
        size = one.shape.numel()
        active = size if is_collected else one.active
        total += Cost(step_operations(2 * size, size, used_by(one), active), 2 * PRODUCTS * size)
    return total


def memory_of(
    model: nn.Module, optimizers: Iterable[Optimizer], parameters: Iterable[SparseParameter]
) -> Memory:
    """Bytes of weights, gradients and optimizer states, as they are stored and as if every weight were dense.

    Args:
        model: all of its parameters count.
        optimizers: those that train it.
        parameters: its sparse weights.

    Example:
        >>> memory_of(nn.Linear(8, 4, bias=False), [], []).weights
        Cost(sparse=128, dense=128)
    """
    owners = {parameter.weight: parameter for parameter in parameters}
    followed = list(optimizers)
    total = Memory()
    for weight in model.parameters():
        index = 0 if weight not in owners else owners[weight].storage.index_bytes
        one = _bytes_of(weight)
        # A gradient has the form of its weight: in compact storage one entry a connection.
        gradient = one if weight.requires_grad else Cost()
        states = sum((_state_bytes(o.state.get(weight, {})) for o in followed), Cost())
        own = 0 if weight not in owners else owners[weight].state.bytes + owners[weight].forward.bytes
        total += Memory(Cost(one.sparse + index, one.dense), gradient, states + Cost(own, 0))
    return total


def _state_bytes(state: Any) -> Cost:
    """What an optimizer keeps for a weight."""
    return sum((_bytes_of(tensor) for _, tensor in entries(state)), Cost())


def _bytes_of(tensor: Tensor) -> Cost:
    """A sparse tensor has the shape of its dense twin."""
    return Cost(stored_numbers(tensor) * tensor.element_size(), tensor.numel() * tensor.element_size())
