"""What an optimizer keeps is told apart by its meaning: connections, matrices, codes, and what it begins with."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import rarefy
from rarefy.errors import RarefyError
from rarefy.storage.optimizer_state import rest_inactive
from rarefy.storage.optimizer_traits import belongs_to_connections


class Keeps(Optimizer):
    """Keeps the states that a function makes of a parameter, and steps like gradient descent."""

    def __init__(self, params, make=lambda p: {}, lr=0.1):
        super().__init__(params, {"lr": lr, "make": make})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p] = self.state[p] or group["make"](p)
                    p.sub_(group["lr"] * p.grad)


def trained(make_optimizer, layers, steps=3, **block):
    """A model after some steps of SET in masked storage, its sparsity and optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(*layers)
    settings = {"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2}, "drop_fraction": 0.5, "seed": 0}
    sparsity = rarefy.configure({**settings, "compute": "masked", **block})
    sparsity.apply(model)
    optimizer = make_optimizer(model.parameters())
    sparsity.apply(optimizer)
    x = torch.randn(8, layers[0].in_features)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model, sparsity, optimizer


def rests(state, mask):
    """Whether only active connections have a state."""
    return bool(state[mask].any()) and not state[~mask].any()


def matrices(p):
    """Momentum and two matrices that multiply from left and right, under names that say nothing."""
    rows, columns = (*p.shape, 1)[:2]
    return {"a": torch.ones_like(p), "b": [torch.ones(rows, rows), torch.ones(columns, columns)]}


def test_other_weights_tell_matrices_from_connections():
    model, _, optimizer = trained(lambda ps: Keeps(ps, matrices), [nn.Linear(16, 16), nn.Linear(16, 4)])
    state, mask = optimizer.state[model[0].weight], model[0].weight_mask
    assert rests(state["a"], mask)
    assert state["b"][0].all() and state["b"][1].all()


def test_a_step_on_a_tiny_weight_tells_them_apart():
    def grows(p):
        return {"thing": torch.ones_like(p), "other": torch.ones(len(p), len(p))}

    model, _, optimizer = trained(lambda ps: Keeps(ps, grows), [nn.Linear(16, 16)])
    state = optimizer.state[model[0].weight]
    assert rests(state["thing"], model[0].weight_mask) and state["other"].all()


def test_names_tell_them_apart():
    class Stubborn(Keeps):
        """Cannot be built again."""

        def __init__(self, params, make):
            if isinstance(params, list):
                raise TypeError("no")
            super().__init__(params, make)

    def named(p):
        return {
            "exp_avg": torch.ones_like(p),
            "preconditioner": torch.ones(len(p), len(p)),
            "GG": [torch.ones(len(p), len(p))],
        }

    model, _, optimizer = trained(lambda ps: Stubborn(ps, named), [nn.Linear(16, 16)])
    state = optimizer.state[model[0].weight]
    assert rests(state["exp_avg"], model[0].weight_mask)
    assert state["preconditioner"].all() and state["GG"][0].all()


def test_what_cannot_be_told_is_left_and_said():
    weight = nn.Parameter(torch.ones(4, 4))

    class Wrapper(Keeps):
        def __init__(self, inner):
            super().__init__(inner)

    optimizer = Wrapper([weight])
    optimizer.state[weight] = {"riddle": torch.ones(4, 4)}
    optimizer.param_groups[0]["make"] = None
    with pytest.warns(
        UserWarning, match=r"Wrapper keeps 'riddle' in the shape of a square weight.*left as it is"
    ):
        assert not belongs_to_connections(optimizer, weight, ("riddle",), weight.shape)


def test_of_a_weight_that_is_not_square_the_shape_tells():
    class Secretive(Optimizer):
        """Cannot be tried out, and names nothing that is known."""

        def __init__(self, params, secret):
            super().__init__(params, {})
            self.secret = secret

    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = Secretive([weight], secret=1)
    assert belongs_to_connections(optimizer, weight, ("riddle",), weight.shape)


def test_complex_states_are_no_codes():
    weight = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    optimizer.state[weight]["momentum_buffer"] = torch.full((2,), 1 + 2j)
    rest_inactive([optimizer], weight, torch.tensor([True, False]))
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [1 + 2j, 0j]


def test_second_moments_in_a_rotated_basis_stay():
    def soap(p):
        return {
            "exp_avg": torch.ones_like(p),
            "exp_avg_sq": torch.ones_like(p),
            "Q": [torch.ones(1)],
            "GG": [],
        }

    model, _, optimizer = trained(lambda ps: Keeps(ps, soap), [nn.Linear(16, 8)])
    state = optimizer.state[model[0].weight]
    assert state["exp_avg_sq"].all() and rests(state["exp_avg"], model[0].weight_mask)


@pytest.mark.parametrize(
    ("make", "key", "rest"),
    [
        (lambda ps: torch.optim.Rprop(ps, lr=0.01), "step_size", 0.01),
        (lambda ps: torch.optim.Adagrad(ps, lr=0.01, initial_accumulator_value=0.1), "sum", 0.1),
        (lambda ps: torch.optim.Adagrad(ps, lr=0.01), "sum", 0.0),
        (lambda ps: torch.optim.AdamW(ps), "exp_avg_sq", 0.0),
    ],
)
@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("loads", [False, True])
def test_new_connections_begin_as_the_optimizer_does(make, key, rest, compute, loads):
    torch.manual_seed(0)
    layer = nn.Linear(64, 64)
    optimizer = make(layer.parameters())
    block = {"algorithm": "set", "sparsity": 0.8, "update": {"freq": 3}, "drop_fraction": 0.5, "seed": 0}
    sparsity = rarefy.configure({**block, "compute": compute})
    sparsity.apply(optimizer)
    sparsity.apply(layer)
    (parameter,) = sparsity.parameters.values()
    old = parameter.mask.clone()
    first = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    x, y = torch.randn(32, 64), torch.randn(32, 64)
    for _ in range(3):
        optimizer.zero_grad()
        (layer(x) - y).square().mean().backward()
        optimizer.step()
    if loads:
        old = parameter.mask.clone()
        layer.load_state_dict(first)
    state = parameter.storage.spread(optimizer.state[parameter.weight][key].detach())
    grown = parameter.mask & ~old
    assert grown.any() and torch.allclose(state[grown], torch.tensor(rest))
    assert not state[~parameter.mask].any()


def eight_bit(p):
    """As bitsandbytes keeps it: codes, and the numbers that they stand for in units of a block's largest."""
    qmap = torch.arange(-127, 128) / 127
    return {"state1": torch.full(p.shape, 200, dtype=torch.uint8), "qmap1": qmap, "absmax1": torch.ones(1)}


def test_codes_are_reset_to_the_one_that_means_zero():
    model, _, optimizer = trained(lambda ps: Keeps(ps, eight_bit), [nn.Linear(16, 8)])
    state, mask = optimizer.state[model[0].weight], model[0].weight_mask
    decoded = state["qmap1"][state["state1"].long()]
    assert not decoded[~mask].any() and (state["state1"][mask] == 200).float().mean() > 0.4


def test_codes_without_a_zero_are_refused_by_name():
    def coded(p):
        return {"codes": torch.full(p.shape, 7, dtype=torch.uint8)}

    with pytest.raises(
        RarefyError, match=r"Keeps keeps 'codes' as codes, and no code is known to mean exactly zero"
    ):
        trained(lambda ps: Keeps(ps, coded), [nn.Linear(16, 8)])


def test_codes_cannot_follow_in_compact_storage():
    with pytest.raises(RarefyError, match=r"codes with a scale for each block.*set compute: masked"):
        trained(lambda ps: Keeps(ps, eight_bit), [nn.Linear(16, 8)], compute="compact")


class Inside(Optimizer):
    """The shape that most wrappers have: groups shared, state in the inner optimizer."""

    def __init__(self, base):
        super().__init__(base.param_groups, {})
        self.base = base
        self.param_groups = base.param_groups

    def step(self, closure=None):
        return self.base.step(closure)


def test_the_state_of_wrapped_optimizers_follows():
    model, sparsity, optimizer = trained(lambda ps: Inside(Inside(torch.optim.AdamW(ps))), [nn.Linear(16, 8)])
    state = optimizer.base.base.state[model[0].weight]["exp_avg"]
    assert sparsity.step == 3 and not state[~model[0].weight_mask].any()
    assert state[model[0].weight_mask].any()


@pytest.mark.parametrize(
    "name", ["SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "ASGD", "Adadelta"]
)
def test_no_state_of_torchs_optimizers_is_a_riddle(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _, optimizer = trained(getattr(torch.optim, name), [nn.Linear(16, 16)])
    mask = model[0].weight_mask
    assert torch.equal(model[0].weight != 0, mask)
    for tensor in optimizer.state[model[0].weight].values():
        if isinstance(tensor, torch.Tensor) and tensor.shape == mask.shape:
            assert not tensor[~mask].any()


class Rotating(Optimizer):
    """Adam in the basis of the gradient's products, which it finds in its first step, as SOAP does."""

    def __init__(self, params, waits=True):
        super().__init__(params, {"lr": 0.01, "waits": waits})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.dim() == 2:
                    self.learn(p, group)

    def learn(self, p, group):
        state = self.state[p]
        grad = torch.zeros(p.shape, dtype=p.dtype).add_(p.grad)
        if not state:
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
            state["Q"] = [torch.linalg.qr(one)[0] for one in (grad @ grad.t(), grad.t() @ grad)]
            if group["waits"]:
                return
        left, right = state["Q"]
        state["exp_avg"].lerp_(grad, 0.1)
        state["exp_avg_sq"].lerp_((left.t() @ grad @ right).square(), 0.1)
        moved = (
            left.t()
            @ (state["exp_avg"] * 1.0)
            @ right
            / (torch.ones(()) * state["exp_avg_sq"]).sqrt().add(0.1)
        )
        p.sub_(group["lr"] * (left @ moved @ right.t()))


@pytest.mark.parametrize("shape", [(16, 16), (16, 8)])
@pytest.mark.parametrize("algorithm", ["static", "set"])
def test_second_moments_in_a_rotated_basis_have_room_in_compact_storage(shape, algorithm):
    found = []
    for compute in ("masked", "compact"):
        update = {"update": {"freq": 2}, "drop_fraction": 0.5} if algorithm == "set" else {"update": None}
        block = {key: value for key, value in update.items() if value is not None}
        torch.manual_seed(0)
        layer = nn.Linear(*shape).double()
        sparsity = rarefy.configure(
            {"algorithm": algorithm, "sparsity": 0.5, "seed": 0, "compute": compute, **block}
        )
        sparsity.apply(layer)
        optimizer = Rotating(layer.parameters())
        sparsity.apply(optimizer)
        for step in range(7):
            optimizer.zero_grad()
            layer(torch.ones(4, shape[0], dtype=torch.float64).cumsum(0) * (step + 1)).sin().sum().backward()
            optimizer.step()
        [parameter] = sparsity.parameters.values()
        found.append((parameter.mask, parameter.dense_weight(), optimizer.state[layer.weight]["exp_avg_sq"]))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_second_moments_that_had_no_room_are_refused():
    with pytest.raises(
        RarefyError, match=r"Rotating keeps 'exp_avg_sq' .* no room for it; set compute: masked"
    ):
        trained(lambda ps: Rotating(ps, waits=False), [nn.Linear(16, 8)], compute="compact")
