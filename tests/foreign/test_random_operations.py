"""Random sequences of what other code does to a model, in each storage, against a dense model masked by hand.

The dense model takes the same operations. After each of its steps its masked weights, gradients and optimizer states
are multiplied by the mask, which is all that a sparse weight may do differently.
"""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import rarefy
from rarefy.nn import SparseLinear

SPARSE = ("0.weight", "2.weight")
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, lr=0.01, centered=True),
    "nadam": lambda parameters: optim.NAdam(parameters, lr=0.01),
    "adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.05),
}


@dataclass
class Side:
    """A model in training, sparse or dense; an operation does the same to both."""

    model: nn.Sequential
    optimizer: optim.Optimizer
    sparsity: rarefy.SparsityAlgorithm | None = None
    kept: dict[str, Tensor] = field(default_factory=dict)

    def take_optimizer(self, name: str) -> None:
        """Goes on with a new optimizer, as a training in two phases does."""
        self.optimizer = OPTIMIZERS[name](list(self.model.parameters()))
        if self.sparsity is not None:
            self.sparsity.apply(self.optimizer)


Operation = Callable[[Side, torch.Generator], None]


def noise(weight: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(weight.shape, dtype=torch.float64, generator=generator) * 0.1


# ---- operations that keep zeros: they may stand before a forward pass ----


def scale_data(side: Side, generator: torch.Generator) -> None:
    side.model[0].weight.data.mul_(0.9)


def clamp(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        for parameter in side.model.parameters():
            parameter.clamp_(-0.2, 0.2)


def write_a_row(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        side.model[2].weight[1] *= 0.5


def copy_itself(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        side.model[0].weight.copy_(side.model[0].weight.detach().clone() * 1.1)


def flatten_and_back(side: Side, generator: torch.Generator) -> None:
    vector = parameters_to_vector(side.model.parameters())
    vector_to_parameters(vector.detach() * 0.95, side.model.parameters())


def write_the_state_dict(side: Side, generator: torch.Generator) -> None:
    for tensor in side.model.state_dict().values():
        if tensor.is_floating_point():
            tensor.mul_(1.05)


def load_what_was_saved(side: Side, generator: torch.Generator) -> None:
    side.model.load_state_dict(copy.deepcopy(side.model.state_dict()))


def average_with_a_copy(side: Side, generator: torch.Generator) -> None:
    twin = copy.deepcopy(side.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
        for mine, other in zip(side.model.parameters(), twin.parameters(), strict=True):
            mine.lerp_(other, 0.3)


def average_over_steps(side: Side, generator: torch.Generator) -> None:
    average = optim.swa_utils.AveragedModel(side.model)
    average.update_parameters(side.model)
    with torch.no_grad():
        side.model[2].weight.mul_(0.5).add_(average.module[2].weight, alpha=0.5)


def use_a_copy(side: Side, generator: torch.Generator) -> None:
    """What is done to a copy leaves the model alone."""
    twin = copy.deepcopy(side.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    twin(torch.ones(1, 20, dtype=torch.float64))


def freeze(side: Side, generator: torch.Generator) -> None:
    weight = side.model[0].weight
    weight.requires_grad_(not weight.requires_grad)
    weight.grad = None


def switch(name: str) -> Operation:
    def operation(side: Side, generator: torch.Generator) -> None:
        side.take_optimizer(name)

    operation.__name__ = f"switch_to_{name}"
    return operation


QUIET: list[Operation] = [
    scale_data,
    clamp,
    write_a_row,
    copy_itself,
    flatten_and_back,
    write_the_state_dict,
    load_what_was_saved,
    average_with_a_copy,
    average_over_steps,
    use_a_copy,
    freeze,
    *map(switch, OPTIMIZERS),
]

# ---- operations that write where connections are inactive: between a backward pass and the optimizer's step ----


def add_everywhere(side: Side, generator: torch.Generator) -> None:
    side.model[0].weight.data.add_(noise(side.model[0].weight, generator))


def copy_over(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        side.model[2].weight.copy_(noise(side.model[2].weight, generator))


def initialise(side: Side, generator: torch.Generator) -> None:
    nn.init.normal_(side.model[0].weight, std=0.1, generator=generator)


def add_to_the_vector(side: Side, generator: torch.Generator) -> None:
    vector = parameters_to_vector(side.model.parameters()).detach()
    vector_to_parameters(vector + noise(vector, generator), side.model.parameters())


def add_to_gradients(side: Side, generator: torch.Generator) -> None:
    for parameter in side.model.parameters():
        added = noise(parameter, generator)
        if parameter.grad is not None:
            parameter.grad.data.add_(added)


def replace_a_gradient(side: Side, generator: torch.Generator) -> None:
    weight = side.model[2].weight
    weight.grad = noise(weight, generator)


def clip_gradients(side: Side, generator: torch.Generator) -> None:
    clip_grad_norm_(side.model.parameters(), 0.1)


LOUD: list[Operation] = [
    add_everywhere,
    copy_over,
    initialise,
    add_to_the_vector,
    add_to_gradients,
    replace_a_gradient,
    clip_gradients,
]


# ---- the two models side by side ----


def sides(algorithm: str, storage: str, seed: int) -> tuple[Side, Side]:
    """The sparse model and the dense one that is masked by hand."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 8)).double()
    dense = Side(copy.deepcopy(model), optim.SGD(model.parameters(), lr=1.0))
    block: dict[str, object] = {"algorithm": algorithm, "sparsity": 0.5, "compute": storage, "seed": seed}
    if algorithm == "set":
        block["update"] = {"freq": 2}
    sparsity = rarefy.configure(block)
    sparsity.apply(model)
    sparse = Side(model, dense.optimizer, sparsity)
    for side in (sparse, dense):
        side.take_optimizer("adam")
    hold(dense, masks_of(sparse))
    return sparse, dense


def masks_of(sparse: Side) -> dict[str, Tensor]:
    assert sparse.sparsity is not None
    return {name: parameter.mask.clone() for name, parameter in sparse.sparsity.parameters.items()}


def hold(dense: Side, masks: dict[str, Tensor]) -> None:
    """What a sparse weight is: zero where its mask says so, and so are its gradient and its optimizer's state."""
    for name, mask in masks.items():
        weight = dense.model.get_parameter(name)
        held = [weight.data, *([] if weight.grad is None else [weight.grad])]
        held += [
            value
            for value in dense.optimizer.state.get(weight, {}).values()
            if isinstance(value, Tensor) and value.shape == weight.shape
        ]
        for tensor in held:
            tensor.mul_(mask)


def hold_gradients(dense: Side, masks: dict[str, Tensor]) -> None:
    for name, mask in masks.items():
        grad = dense.model.get_parameter(name).grad
        if grad is not None:
            grad.mul_(mask)


def backward(side: Side, x: Tensor) -> None:
    side.optimizer.zero_grad()
    side.model(x).square().mean().backward()


def check(sparse: Side, dense: Side, masks: dict[str, Tensor], x: Tensor) -> None:
    assert sparse.sparsity is not None
    for name, parameter in sparse.sparsity.parameters.items():
        found = parameter.dense_weight()
        torch.testing.assert_close(found, dense.model.get_parameter(name).detach(), rtol=1e-9, atol=1e-11)
        assert (found[~masks[name]] == 0).all()
    with torch.no_grad():
        torch.testing.assert_close(sparse.model(x), dense.model(x), rtol=1e-9, atol=1e-11)


def train(sparse: Side, dense: Side, rounds: list[tuple[Operation | None, Operation | None]]) -> None:
    """Trains both; each round has an operation before its forward pass and one before its optimizer's step."""
    for number, (before, between) in enumerate(rounds):
        x = torch.randn(5, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        masks = masks_of(sparse)
        for side in (sparse, dense):
            if before is not None:
                before(side, torch.Generator().manual_seed(number))
            backward(side, x)
        hold_gradients(dense, masks)
        for side in (sparse, dense):
            if between is not None:
                between(side, torch.Generator().manual_seed(number))
        hold_gradients(dense, masks)
        for side in (sparse, dense):
            side.optimizer.step()
        hold(dense, masks)  # what was written to an inactive connection is gone before it may become active
        masks = masks_of(sparse)
        hold(dense, masks)
        check(sparse, dense, masks, x)


def supported(sparse: Side) -> None:
    """A layer that changes its class hands out copies of its weight, to which nobody can write."""
    if any(isinstance(module, SparseLinear) for module in sparse.model.modules()):
        pytest.skip("this compact storage has no weight to write to")


@pytest.mark.parametrize("algorithm", ["static", "set"])
@pytest.mark.parametrize("storage", ["masked", "compact", "auto"])
@settings(max_examples=15, deadline=None)
@given(
    rounds=st.lists(
        st.tuples(st.none() | st.sampled_from(QUIET), st.none() | st.sampled_from(LOUD)),
        min_size=1,
        max_size=6,
    ),
    seed=st.integers(0, 3),
)
def test_the_result_is_that_of_a_dense_model_masked_by_hand(algorithm, storage, rounds, seed):
    sparse, dense = sides(algorithm, storage, seed)
    supported(sparse)
    assert set(masks_of(sparse)) == set(SPARSE)
    train(sparse, dense, rounds)


@pytest.mark.parametrize("operation", QUIET, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_each_operation_that_keeps_zeros(storage, operation):
    sparse, dense = sides("set", storage, 0)
    supported(sparse)
    train(sparse, dense, [(None, None), (operation, None), (None, None), (operation, None), (None, None)])


@pytest.mark.parametrize("operation", LOUD, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_each_operation_that_writes_everywhere(storage, operation):
    sparse, dense = sides("set", storage, 0)
    supported(sparse)
    train(sparse, dense, [(None, None), (None, operation), (None, None), (None, operation), (None, None)])


def test_a_weight_that_is_not_held_is_noticed():
    """The comparison itself: another value at an active connection, and one at an inactive connection."""
    sparse, dense = sides("static", "masked", 0)
    masks = masks_of(sparse)
    x = torch.ones(1, 20, dtype=torch.float64)
    check(sparse, dense, masks, x)
    for active in (True, False):
        place = tuple((masks["0.weight"] == active).nonzero()[0].tolist())
        before = sparse.model[0].weight.data[place].item()
        sparse.model[0].weight.data[place] = 7.0
        with pytest.raises(AssertionError):
            check(sparse, dense, masks, x)
        sparse.model[0].weight.data[place] = before
