"""What other code does to a model in training, sparse or dense: one function an operation."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.utils.checkpoint
from torch import Tensor, nn, optim
from torch.nn.utils import clip_grad_norm_, parameters_to_vector, vector_to_parameters

import rarefy

# Older versions lose the hooks of compact weights then, which is refused there.
NOT_REENTRANT = (False,) if torch.__version__ >= (2, 10) else ()
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
    aside: dict[str, Tensor] = field(default_factory=dict)

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
    for reentrant in (*NOT_REENTRANT, True):
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
