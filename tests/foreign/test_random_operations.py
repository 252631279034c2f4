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
import torch.utils.checkpoint
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import rarefy

SPARSE = ("0.weight", "2.weight")
OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], optim.Optimizer]] = {
    "sgd": lambda parameters: optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: optim.Adam(parameters, lr=0.01),
    "adamw": lambda parameters: optim.AdamW(parameters, lr=0.01, amsgrad=True),
    "rmsprop": lambda parameters: optim.RMSprop(parameters, lr=0.01, centered=True),
    "nadam": lambda parameters: optim.NAdam(parameters, lr=0.01),
    "adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.05),
    "adadelta": lambda parameters: optim.Adadelta(parameters, lr=0.5),
    "adamax": lambda parameters: optim.Adamax(parameters, lr=0.01),
    "radam": lambda parameters: optim.RAdam(parameters, lr=0.01),
    "fused_adam": lambda parameters: optim.Adam(parameters, lr=0.01, fused=True),
    "foreach_sgd": lambda parameters: optim.SGD(
        parameters, lr=0.05, momentum=0.9, nesterov=True, foreach=True
    ),
    "looped_adamw": lambda parameters: optim.AdamW(parameters, lr=0.01, foreach=False),
    "decoupled_nadam": lambda parameters: optim.NAdam(parameters, lr=0.01, decoupled_weight_decay=True),
}


@dataclass
class Side:
    """A model in training, sparse or dense; an operation does the same to both."""

    model: nn.Sequential
    optimizer: optim.Optimizer
    sparsity: rarefy.SparsityAlgorithm | None = None
    hooked: list[nn.Parameter] = field(default_factory=list)

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


def save_and_load_the_optimizer(side: Side, generator: torch.Generator) -> None:
    side.optimizer.load_state_dict(copy.deepcopy(side.optimizer.state_dict()))


def change_a_learning_rate(side: Side, generator: torch.Generator) -> None:
    for group in side.optimizer.param_groups:
        group["lr"] *= 0.9


def convert_there_and_back(side: Side, generator: torch.Generator) -> None:
    side.model.float()
    side.model.double()


def share_memory(side: Side, generator: torch.Generator) -> None:
    side.model.share_memory()


def load_a_changed_copy(side: Side, generator: torch.Generator) -> None:
    twin = copy.deepcopy(side.model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.8)
    side.model.load_state_dict(twin.state_dict())


def write_back_an_average_with_buffers(side: Side, generator: torch.Generator) -> None:
    average = optim.swa_utils.AveragedModel(side.model, use_buffers=True)
    for factor in (1.0, 0.5):
        with torch.no_grad():
            side.model[0].weight.mul_(factor)
        average.update_parameters(side.model)
    with torch.no_grad():
        for mine, other in zip(side.model.parameters(), average.module.parameters(), strict=True):
            mine.copy_(other)


def ask_by_functions(side: Side, generator: torch.Generator) -> None:
    """What other code computes with the model's parameters leaves no trace."""
    named = {name: parameter.detach() for name, parameter in side.model.named_parameters()}
    x = torch.ones(3, 20, dtype=torch.float64)
    torch.func.functional_call(side.model, named, (x,))
    torch.func.vmap(side.model)(x)
    torch.autograd.functional.jacobian(side.model, x[0])


def leave_a_gradient_of_another_loss(side: Side, generator: torch.Generator) -> None:
    """The step's zero_grad takes it away."""
    side.model(torch.ones(2, 20, dtype=torch.float64)).sum().backward()


def hook_gradients(side: Side, generator: torch.Generator) -> None:
    for parameter in side.model.parameters():
        if parameter.requires_grad and not any(parameter is one for one in side.hooked):
            side.hooked.append(parameter)
            parameter.register_hook(lambda grad: grad * 0.5)


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
    save_and_load_the_optimizer,
    change_a_learning_rate,
    convert_there_and_back,
    share_memory,
    load_a_changed_copy,
    write_back_an_average_with_buffers,
    ask_by_functions,
    leave_a_gradient_of_another_loss,
    hook_gradients,
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


def clip_values(side: Side, generator: torch.Generator) -> None:
    nn.utils.clip_grad_value_(side.model.parameters(), 0.01)


def accumulate_another_batch(side: Side, generator: torch.Generator) -> None:
    x = torch.randn(4, 20, dtype=torch.float64, generator=generator)
    (side.model(x) - 1).square().mean().backward()


def add_what_autograd_gives(side: Side, generator: torch.Generator) -> None:
    x = torch.randn(4, 20, dtype=torch.float64, generator=generator)
    wanted = [parameter for parameter in side.model.parameters() if parameter.requires_grad]
    for parameter, grad in zip(wanted, torch.autograd.grad(side.model(x).sum(), wanted), strict=True):
        parameter.grad = grad if parameter.grad is None else parameter.grad + grad


def assign_what_functions_give(side: Side, generator: torch.Generator) -> None:
    x = torch.randn(4, 20, dtype=torch.float64, generator=generator)
    named = {name: parameter.detach() for name, parameter in side.model.named_parameters()}
    found = torch.func.grad(lambda values: torch.func.functional_call(side.model, values, (x,)).sum())(named)
    for name, parameter in side.model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = found[name].detach().clone()


def recompute_in_the_backward_pass(side: Side, generator: torch.Generator) -> None:
    x = torch.randn(4, 20, dtype=torch.float64, generator=generator).requires_grad_()
    for reentrant in (False, True):
        torch.utils.checkpoint.checkpoint(side.model, x, use_reentrant=reentrant).sum().backward()


def write_through_a_view(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        side.model[0].weight.t()[2:5].add_(noise(side.model[0].weight.t()[2:5], generator))
        side.model[2].weight.view(-1)[::3] = 0.25


def fill_the_state_dict(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        side.model.state_dict()["0.weight"].copy_(noise(side.model[0].weight, generator))


LOUD: list[Operation] = [
    clip_values,
    accumulate_another_batch,
    add_what_autograd_gives,
    assign_what_functions_give,
    recompute_in_the_backward_pass,
    write_through_a_view,
    fill_the_state_dict,
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
    assert set(masks_of(sparse)) == set(SPARSE)
    train(sparse, dense, rounds)


@pytest.mark.parametrize("operation", QUIET, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_each_operation_that_keeps_zeros(storage, operation):
    sparse, dense = sides("set", storage, 0)
    train(sparse, dense, [(None, None), (operation, None), (None, None), (operation, None), (None, None)])


@pytest.mark.parametrize("operation", LOUD, ids=lambda operation: operation.__name__)
@pytest.mark.parametrize("storage", ["masked", "compact"])
def test_each_operation_that_writes_everywhere(storage, operation):
    sparse, dense = sides("set", storage, 0)
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
