"""More of what other code does to a model in training: functions, copies, swaps, files, gradients put in place."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn, optim
from torch.nn.utils import clip_grad_norm_, parametrize, prune

from foreign.operations import Operation, Side, noise

X = torch.linspace(-1, 1, 60, dtype=torch.float64).view(3, 20).sin()


# ---- operations that keep zeros: they may stand before a forward pass ----


def swap_an_average_and_back(side: Side, generator: torch.Generator) -> None:
    """An evaluation with other weights, as averages do it: stored, copied over, put back."""
    stored = [parameter.detach().clone() for parameter in side.model.parameters()]
    with torch.no_grad():
        for parameter in side.model.parameters():
            parameter.copy_(parameter.detach() * 0.5)
        side.model(X)
        for parameter, before in zip(side.model.parameters(), stored, strict=True):
            parameter.copy_(before)


def swap_data_and_back(side: Side, generator: torch.Generator) -> None:
    twin = copy.deepcopy(side.model)
    for _ in range(2):
        for mine, other in zip(side.model.parameters(), twin.parameters(), strict=True):
            mine.data, other.data = other.data, mine.data
        side.model(X)


def assign_data(side: Side, generator: torch.Generator) -> None:
    for parameter in side.model.parameters():
        parameter.data = parameter.data * 0.9


def load_by_assignment(side: Side, generator: torch.Generator) -> None:
    side.model.load_state_dict(copy.deepcopy(side.model.state_dict()), assign=True)
    side.take_optimizer("sgd")


def train_a_copy(side: Side, generator: torch.Generator) -> None:
    twin = copy.deepcopy(side.model)
    alone = optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    for _ in range(2):
        alone.zero_grad()
        twin(X).square().sum().backward()
        if any(parameter.grad is not None for parameter in twin.parameters()):
            alone.step()


def convert_to_half_and_back(side: Side, generator: torch.Generator) -> None:
    side.model.half().to(torch.float32).double()


def parametrize_a_bias_for_a_while(side: Side, generator: torch.Generator) -> None:
    parametrize.register_parametrization(side.model[0], "bias", nn.Identity())
    side.model(X)
    parametrize.remove_parametrizations(side.model[0], "bias")


def prune_a_bias(side: Side, generator: torch.Generator) -> None:
    prune.l1_unstructured(side.model[2], "bias", 0.25)
    side.model(X)
    prune.remove(side.model[2], "bias")


def transform(side: Side, generator: torch.Generator) -> None:
    """With the parameters themselves, not detached."""
    named = dict(side.model.named_parameters())

    def loss(values):
        return torch.func.functional_call(side.model, values, (X,)).square().sum()

    grads = torch.func.grad(loss)(named)
    torch.func.jvp(loss, (named,), (grads,))

    def of_one(values, x):
        return torch.func.functional_call(side.model, values, (x,)).sum()

    torch.func.vmap(torch.func.grad(of_one), (None, 0))(named, X)


def call_with_other_weights(side: Side, generator: torch.Generator) -> None:
    """A step of meta-learning: the fast weights get gradients, the model's own none."""
    fast = {
        name: nn.Parameter(torch.ones(one.shape, dtype=one.dtype))
        for name, one in side.model.named_parameters()
    }
    torch.func.functional_call(side.model, fast, (X,)).square().sum().backward()
    assert all(one.grad is not None and bool(one.grad.ne(0).all()) for one in fast.values())


def freeze_all_for_a_while(side: Side, generator: torch.Generator) -> None:
    wanted = [parameter.requires_grad for parameter in side.model.parameters()]
    side.model.requires_grad_(False)
    side.model(X)
    for parameter, was_wanted in zip(side.model.parameters(), wanted, strict=True):
        parameter.requires_grad_(was_wanted)


def through_a_file(side: Side, generator: torch.Generator) -> None:
    file = io.BytesIO()
    torch.save({"model": side.model.state_dict(), "optimizer": side.optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    side.model.load_state_dict(loaded["model"])
    side.optimizer.load_state_dict(loaded["optimizer"])


def load_an_unpickled_copy(side: Side, generator: torch.Generator) -> None:
    twin = pickle.loads(pickle.dumps(side.model))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.div_(1.25)
    side.model.load_state_dict(twin.state_dict())


def zero_gradients_in_place(side: Side, generator: torch.Generator) -> None:
    side.model.zero_grad(set_to_none=False)


def evaluate(side: Side, generator: torch.Generator) -> None:
    with torch.inference_mode():
        side.model.eval()(X)
    side.model.train()


def scale_with_foreach(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        torch._foreach_mul_(list(side.model.parameters()), 0.95)


def swap_parameters_for_an_evaluation(side: Side, generator: torch.Generator) -> None:
    mine = side.model[2].weight
    side.model[2].weight = copy.deepcopy(mine)
    side.model(X)
    side.model[2].weight = mine


def swap_tensors_with_a_copy(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        own = side.model[0].weight
        other = own.detach().clone().mul_(0.7)
        own.set_(other) if type(own) is nn.Parameter else own.copy_(other)


QUIET_TOO: list[Operation] = [
    swap_an_average_and_back,
    swap_data_and_back,
    assign_data,
    load_by_assignment,
    train_a_copy,
    convert_to_half_and_back,
    parametrize_a_bias_for_a_while,
    prune_a_bias,
    transform,
    call_with_other_weights,
    freeze_all_for_a_while,
    through_a_file,
    load_an_unpickled_copy,
    zero_gradients_in_place,
    evaluate,
    scale_with_foreach,
    swap_parameters_for_an_evaluation,
    swap_tensors_with_a_copy,
]


# ---- operations that write where connections are inactive: between a backward pass and the optimizer's step ----


def forget_a_gradient(side: Side, generator: torch.Generator) -> None:
    side.model[0].weight.grad = None


def put_zeros(side: Side, generator: torch.Generator) -> None:
    weight = side.model[2].weight
    weight.grad = torch.zeros(weight.shape, dtype=weight.dtype)


def put_a_copy(side: Side, generator: torch.Generator) -> None:
    for parameter in side.model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad.clone()


def add_in_place(side: Side, generator: torch.Generator) -> None:
    for parameter in side.model.parameters():
        added = noise(parameter, generator)
        if parameter.grad is not None:
            parameter.grad += added


def clip_with_foreach(side: Side, generator: torch.Generator) -> None:
    clip_grad_norm_(side.model.parameters(), 0.05, foreach=True)


def clip_the_largest(side: Side, generator: torch.Generator) -> None:
    clip_grad_norm_(side.model.parameters(), 0.01, norm_type=float("inf"))


def scale_gradients_with_foreach(side: Side, generator: torch.Generator) -> None:
    torch._foreach_mul_([one.grad for one in side.model.parameters() if one.grad is not None], 0.5)


def add_noise_with_foreach(side: Side, generator: torch.Generator) -> None:
    parameters = list(side.model.parameters())
    with torch.no_grad():
        torch._foreach_add_(parameters, [noise(parameter, generator) for parameter in parameters])


def assign_other_data(side: Side, generator: torch.Generator) -> None:
    side.model[0].weight.data = noise(side.model[0].weight, generator)


def reset(side: Side, generator: torch.Generator) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        side.model[2].reset_parameters()


def load_dense_weights(side: Side, generator: torch.Generator) -> None:
    state = {name: noise(one, generator) for name, one in side.model.named_parameters()}
    side.model.load_state_dict(state, strict=False)


def write_with_where(side: Side, generator: torch.Generator) -> None:
    with torch.no_grad():
        weight = side.model[0].weight
        weight.copy_(torch.where(weight == 0, noise(weight, generator), weight * 1.0))
        weight.masked_fill_(noise(weight, generator) > 0.1, 0.3)
        weight.index_copy_(0, torch.tensor([1]), noise(weight, generator)[:1])


def write_by_an_optimizer_of_its_own(side: Side, generator: torch.Generator) -> None:
    """A second optimizer, which nobody follows, decays the same weights."""
    other = optim.SGD([side.model[0].weight], lr=0.1, weight_decay=0.5)
    other.step()


LOUD_TOO: list[Operation] = [
    forget_a_gradient,
    put_zeros,
    put_a_copy,
    add_in_place,
    clip_with_foreach,
    clip_the_largest,
    scale_gradients_with_foreach,
    add_noise_with_foreach,
    assign_other_data,
    reset,
    load_dense_weights,
    write_with_where,
    write_by_an_optimizer_of_its_own,
]
