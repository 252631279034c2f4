"""Writes from outside: a managed weight holds its zeros, a free copy holds everything, as the dense model would."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from rarefy.errors import RarefyError
from rarefy.tensors import Role, SparseWeight
from sparse_weights import Pair, inputs, make_sparse, masks_of, move, whole


def train(model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        optimizer.zero_grad()
        model(inputs(step)).square().mean().backward()
        optimizer.step()


# ---- the trained model ----


@torch.no_grad()
def clamp(model):
    for parameter in model.parameters():
        parameter.clamp_(-0.05, 0.05)
    model[0].weight.data.clamp_(min=0.01)


def initialise(model):
    nn.init.xavier_uniform_(model[0].weight)
    nn.init.orthogonal_(model[4].weight)
    nn.init.zeros_(model[0].bias)
    nn.init.trunc_normal_(model[2].weight, std=0.02)


def fill(model):
    nn.init.constant_(model[0].weight, 0.3)
    model[2].weight.data.fill_(2.0)
    model[4].weight.data.zero_()


def reset(model):
    model.apply(lambda module: module.reset_parameters() if isinstance(module, nn.Linear) else None)


def through_a_vector(model):
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector * 0.5 + 0.1, model.parameters())


def merge(model):
    model[0].weight.data += torch.randn(40, 4) @ torch.randn(4, 24)
    model[2].weight.data = model[2].weight.data + torch.ones(40, 40)
    model[4].weight.data = model[4].weight.data * 2


@torch.no_grad()
def through_views(model):
    weight = model[0].weight
    weight[0] = 5
    weight[:, 3].zero_()
    weight.view(-1).mul_(0.5)
    weight.t().add_(1)
    weight[1, :4] += 2
    _, second = weight.chunk(2)
    second.mul_(3)
    weight.flatten()[5:50].fill_(7)
    weight.masked_fill_(torch.rand(weight.shape) < 0.2, 9.0)
    weight.index_fill_(0, torch.tensor([2]), 4.0)
    weight.index_put_((torch.tensor([1, 2]), torch.tensor([3, 4])), torch.tensor([8.0, 9.0]))
    weight.t()[0].copy_(torch.arange(40.0))
    torch._foreach_mul_([weight[3], weight[4]], 2.0)


@torch.no_grad()
def rescale(model):
    weight = model[0].weight
    weight.div_(weight.norm(dim=1, keepdim=True).clamp_min(1e-6))
    weight.copy_(weight * weight.abs().mean())
    weight.mul_(torch.rand(24))
    model[2].weight.copy_(torch.randn(40, 40))
    torch.add(model[4].weight, 1.0, out=model[4].weight)


@torch.no_grad()
def with_lists(model):
    weights = [model[0].weight, model[0].bias, model[2].weight]
    torch._foreach_add_(weights, 1.0)
    torch._foreach_mul_(weights, [torch.rand(weight.shape) for weight in weights])
    torch._foreach_copy_(weights[2:], torch._foreach_mul(weights[2:], 3.0))
    torch._foreach_copy_(weights, torch._foreach_exp(weights))
    torch._foreach_clamp_max_(weights, 2.0)


def at_random(model):
    model[0].weight.data.normal_()
    model[2].weight.data.uniform_(-1, 1)
    model[4].weight.data.bernoulli_(0.5)


WRITES = [
    clamp,
    initialise,
    fill,
    reset,
    through_a_vector,
    merge,
    through_views,
    rescale,
    with_lists,
    at_random,
]


@pytest.mark.parametrize("write", WRITES)
def test_a_managed_weight_takes_what_is_written_at_its_connections(write):
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        torch.manual_seed(5)
        write(model)
        for name, mask in pair.masks.items() if model is pair.dense else ():
            model.get_parameter(name).data.mul_(mask)
    pair.assert_equal(atol=1e-5)


@pytest.mark.parametrize("write", WRITES)
def test_a_free_copy_holds_everything_that_is_written(write):
    pair = Pair(role=Role.FREE)
    pair.run(write)
    pair.assert_equal(held=False, atol=1e-5)


def test_training_goes_on_after_writes():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        torch.manual_seed(5)
        initialise(model)
        clamp(model)
        for name, mask in pair.masks.items() if model is pair.dense else ():
            model.get_parameter(name).data.mul_(mask)
        train(model)
    pair.assert_equal()


def test_pruning_on_top():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        nn.utils.prune.l1_unstructured(model[0], "weight", 0.8)
        train(model)
        nn.utils.prune.remove(model[0], "weight")
    torch.testing.assert_close(whole(pair.sparse[0].weight), pair.dense[0].weight.detach())


def test_weight_norm_and_spectral_norm():
    pair = Pair()

    def normalise(model):
        nn.utils.parametrizations.spectral_norm(model[2])
        train(model)
        return model(inputs(9)).detach()

    torch.testing.assert_close(*pair.run(normalise))


# ---- averages ----


def by_state_dict(model):
    average = copy.deepcopy(model)
    for _ in range(3):
        train(model)
        with torch.no_grad():
            for key, value in average.state_dict().items():
                value *= 0.9
                value += (1 - 0.9) * model.state_dict()[key]
    return average


def by_copy(model):
    average = copy.deepcopy(model)
    for _ in range(3):
        train(model)
        with torch.no_grad():
            for key, value in average.state_dict().items():
                value.copy_(value * 0.9 + 0.1 * model.state_dict()[key].detach())
    return average


def by_parameters(model):
    average = copy.deepcopy(model)
    for _ in range(3):
        train(model)
        for one, other in zip(model.parameters(), average.parameters(), strict=True):
            other.data.copy_(0.1 * one.data + 0.9 * other.data)
            other.data.mul_(0.5).add_(0.5 * one.data)
            other.data.lerp_(one.data, 0.1)
    return average


def averaged(**options):
    def average(model):
        shadow = AveragedModel(model, **options)
        for _ in range(3):
            train(model)
            shadow.update_parameters(model)
        return shadow.module

    return average


AVERAGES = [
    by_state_dict,
    by_copy,
    by_parameters,
    averaged(),
    averaged(multi_avg_fn=get_ema_multi_avg_fn(0.9)),
    averaged(avg_fn=get_ema_avg_fn(0.9)),
]


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_are_those_of_the_dense_model(average):
    pair = Pair()
    pair.dense, pair.sparse = pair.run(average)
    pair.assert_equal()


@pytest.mark.parametrize("average", AVERAGES)
def test_averages_over_several_topologies_hold_all_their_connections(average):
    pair = Pair()
    new = masks_of(pair.dense, seed=11)
    changed = []

    class Moving(nn.Sequential):
        """Takes another topology in its second round of training."""

        def forward(self, x):
            changed.append(self)
            if changed.count(self) == 5 and self.training:
                for name, mask in new.items():
                    weight = self.get_parameter(name)
                    if isinstance(weight, SparseWeight):
                        move(weight, mask)
                    else:
                        weight.data.mul_(mask)
                        weight._backward_hooks.clear()
                        weight.register_hook(lambda grad, mask=mask: grad * mask)
            return super().forward(x)

    pair.dense, pair.sparse = Moving(*pair.dense), Moving(*pair.sparse)
    trained = pair.sparse
    pair.dense, pair.sparse = pair.run(average)
    pair.assert_equal(held=False)
    density = pair.sparse[0].weight.connections / pair.sparse[0].weight.numel()
    assert torch.equal(trained[0].weight.topology.mask(), new["0.weight"]) and 0.4 < density < 0.65


def test_the_mean_of_two_models_with_other_topologies():
    first, second = Pair(), Pair()
    for name, mask in masks_of(second.dense, seed=78).items():
        move(second.sparse.get_parameter(name), mask)
    expected = [
        (whole(one) + whole(other)) / 2
        for one, other in zip(first.sparse.parameters(), second.sparse.parameters(), strict=True)
    ]
    soup = copy.deepcopy(first.sparse)
    with torch.no_grad():
        for one, other in zip(soup.parameters(), second.sparse.parameters(), strict=True):
            one.add_(other).div_(2)
    for found, wanted in zip(soup.parameters(), expected, strict=True):
        torch.testing.assert_close(whole(found), wanted)


def test_an_average_that_starts_at_zero_takes_every_connection():
    pair = Pair()
    weight = pair.sparse[0].weight
    average = torch.zeros_like(weight)
    average.add_(weight.detach(), alpha=0.5)
    first = whole(weight)
    move(weight, masks_of(pair.dense, seed=3)["0.weight"])
    average.add_(weight.detach(), alpha=0.5)
    torch.testing.assert_close(average.dense(), 0.5 * (first + whole(weight)))


# ---- roles ----


@pytest.fixture
def weight():
    torch.manual_seed(0)
    dense, mask = torch.randn(6, 5), torch.rand(6, 5) < 0.5
    return SparseWeight.from_dense(dense, mask, Role.MANAGED)


def other_topology(weight):
    return SparseWeight.from_dense(torch.ones(6, 5), ~weight.topology.mask())


@pytest.mark.parametrize(
    "write",
    [
        lambda weight, other: weight.copy_(other),
        lambda weight, other: weight.add_(other),
        lambda weight, other: weight.lerp_(other, 0.1),
        lambda weight, other: torch._foreach_add_([weight], [other]),
        lambda weight, other: setattr(weight, "data", other),
    ],
)
def test_a_managed_weight_refuses_other_connections(weight, write):
    before = weight.dense()
    with pytest.raises(
        RarefyError, match=r"with \d+ other connections is not allowed .* give its \.dense\(\)"
    ):
        write(weight, other_topology(weight))
    assert torch.equal(weight.dense(), before)


def test_a_managed_weight_takes_part_of_its_connections(weight):
    mask = weight.topology.mask()
    part = mask & (torch.rand(6, 5) < 0.5)
    topology = weight.topology
    weight.copy_(SparseWeight.from_dense(torch.ones(6, 5), part))
    assert torch.equal(weight.dense(), part.float()) and weight.topology is topology
    weight.add_(SparseWeight.from_dense(torch.ones(6, 5), part)).mul_(other_topology(weight))
    assert not weight.dense().any()


def test_a_free_copy_takes_the_topology_of_what_it_becomes(weight):
    copied, other = copy.deepcopy(weight), other_topology(weight)
    assert copied.role is Role.FREE
    copied.copy_(other)
    assert torch.equal(copied.dense(), other.dense()) and copied.topology is other.topology
    assert not torch.equal(weight.dense(), other.dense())


def test_what_belongs_to_a_weight_keeps_its_connections(weight):
    state = torch.zeros_like(weight)
    state.add_(torch.ones(6, 5))
    assert state.role is Role.COMPANION and torch.equal(state.dense(), weight.topology.mask().float())
    # A number is added everywhere, as it costs nothing to remember.
    state.add_(1)
    assert state.connections == weight.connections and torch.equal(
        state.dense(), 1.0 + weight.topology.mask()
    )
    assert (torch.zeros_like(weight) * 2).role is Role.COMPANION and (weight * 2).role is Role.FREE
    assert weight.clone().role is Role.FREE and state.clone().role is Role.COMPANION


def test_aliases_follow_a_new_topology(weight):
    alias, view = weight.data, weight.detach().t()
    mask = torch.rand(6, 5) < 0.5
    weight.copy_(torch.ones(6, 5))
    before = weight.topology.mask()
    move(weight, mask)
    assert torch.equal(alias.dense(), (mask & before).float()) and alias.topology is weight.topology
    assert torch.equal(view.dense(), alias.dense().t())


def test_a_backward_pass_through_a_graph_from_before_is_refused():
    pair = Pair()
    loss = pair.sparse(inputs(0)).sum()
    move(pair.sparse[0].weight, masks_of(pair.dense, seed=3)["0.weight"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("write", "problem"),
    [
        (lambda weight: weight.resize_(2, 2), "resize_ is not allowed on a sparse weight"),
        (lambda weight: weight.set_(torch.ones(3)), "set_ is not allowed on a sparse weight"),
        (
            lambda weight: setattr(weight, "data", torch.ones(3)),
            r"shape \(3,\) is not allowed; a sparse weight keeps",
        ),
        (lambda weight: weight.squeeze_().unsqueeze_(0), r"shape \(1, 6, 5\) is not allowed"),
    ],
)
def test_a_sparse_weight_keeps_its_shape(weight, write, problem):
    with pytest.raises((RarefyError, RuntimeError), match=problem):
        write(weight)
    assert weight.shape == (6, 5)


def test_frozen_weights_become_trainable_again():
    pair = Pair()
    for model in (pair.dense, pair.sparse):
        model[0].requires_grad_(False)
        train(model, 2)
        assert model[0].weight.grad is None
        model[0].requires_grad_(True)
        train(model, 2)
    pair.assert_equal()


def test_a_weight_that_was_made_sparse_while_it_was_frozen():
    layer = nn.Linear(4, 4).requires_grad_(False)
    make_sparse(layer.weight, torch.eye(4, dtype=torch.bool))
    layer.weight.requires_grad_(True)
    (layer.weight @ torch.ones(4)).sum().backward()
    assert isinstance(layer.weight.grad, SparseWeight)


# ---- `.data` that is taken, replaced, and put back ----


@pytest.mark.parametrize("role", [Role.MANAGED, Role.FREE])
def test_data_that_was_taken_keeps_its_numbers_when_other_data_is_assigned(role):
    pair = Pair(role=role)

    def with_other_data(model):
        train(model, 1)
        taken = [parameter.data for parameter in model.parameters()]
        gradient = model[0].weight.grad.data
        for parameter in model.parameters():
            parameter.data = parameter.data * 0.5
        model[0].weight.grad.data = gradient * 3
        seen = model(inputs(3)).detach()
        for parameter, data in zip(model.parameters(), taken, strict=True):
            parameter.data = data
        model[0].weight.grad.data = gradient
        return torch.cat([seen, model(inputs(3)).detach(), whole(model[0].weight.grad)[:, :8]])

    expected, found = pair.run(with_other_data)
    torch.testing.assert_close(found, expected)
    pair.run(train)
    pair.assert_equal(held=role is Role.MANAGED)


def test_the_dense_gradient_is_seen_after_other_data_was_assigned():
    model = Pair().sparse
    collected = []
    model[2].weight._cell.collect = collected.append
    model[2].weight.data = model[2].weight.data * 0.5
    model(inputs(0)).square().mean().backward()
    assert len(collected) == 1 and collected[0].shape == (40, 40)


def test_shared_memory_stays_shared_when_its_own_data_is_assigned():
    weight = Pair().sparse[0].weight.share_memory_()
    weight.data = weight.data
    assert weight.is_shared()
