"""Gradients from everywhere: RigL follows them, whoever computed them, and sees those of the step that is taken."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportOptionalMemberAccess=false, reportOperatorIssue=false, reportFunctionMemberAccess=false
# pyright: reportOptionalSubscript=false, reportUnusedExpression=false, reportIncompatibleMethodOverride=false
# pyright: reportOptionalCall=false

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import rarefy
from foreign.networks import RIGL, SET, assert_zeros, inputs, loss_of, network, sparse, step_once
from foreign.operations import NOT_REENTRANT
from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.errors import RarefyError
from rarefy.masks import drop_lowest, grow_highest

EVERY = {**RIGL, "update": {"freq": 1}}


def moved(model, first):
    return int((model[0].weight_mask & ~first).sum())


# ---- gradients that backward() did not leave ----


def by_backward(model, optimizer, step):
    loss_of(model, step).backward()


def by_backward_and_clipped(model, optimizer, step):
    loss_of(model, step).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


def by_autograd_grad(model, optimizer, step):
    parameters = list(model.parameters())
    for parameter, grad in zip(
        parameters, torch.autograd.grad(loss_of(model, step), parameters), strict=True
    ):
        parameter.grad = grad


def by_functional_grad(model, optimizer, step):
    named = dict(model.named_parameters())

    def loss(values):
        return (torch.func.functional_call(model, values, (inputs(step),)) - 1).square().mean()

    for name, grad in torch.func.grad(loss)(named).items():
        named[name].grad = grad.detach().clone()


def by_autograd_grad_and_clipped(model, optimizer, step):
    by_autograd_grad(model, optimizer, step)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.parametrize(
    ("way", "compute"),
    [
        (by_autograd_grad, "masked"),
        (by_functional_grad, "masked"),
        (by_autograd_grad, "compact"),
        (by_functional_grad, "compact"),
        # masked, the norm is that of the dense gradient: nothing has selected yet what was assigned
        (by_autograd_grad_and_clipped, "compact"),
    ],
)
def test_rigl_follows_gradients_that_are_assigned(way, compute):
    masks = []
    first_way = by_backward_and_clipped if way is by_autograd_grad_and_clipped else by_backward
    for one in (first_way, way):
        model, optimizer, sparsity = sparse(RIGL, compute=compute)
        first = model[0].weight_mask.clone()
        for step in range(8):
            optimizer.zero_grad()
            one(model, optimizer, step)
            optimizer.step()
            assert_zeros(model, sparsity)
        masks.append(model[0].weight_mask)
        assert moved(model, first) > 50 and sparsity.updates == 5
    assert torch.equal(*masks)


def test_rigl_takes_no_dense_gradient_of_another_purpose():
    """A gradient that is asked for to look at, and another that is assigned: the topology stays, and that is said."""
    model, optimizer, _ = sparse(EVERY, compute="compact")
    before = model[0].weight_mask.clone()
    torch.autograd.grad(loss_of(model, 5).square(), list(model.parameters()))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter).add_(torch.randn(parameter.shape))
    with pytest.warns(UserWarning, match="keeps its topology at step 1"):
        optimizer.step()
    assert torch.equal(model[0].weight_mask, before)


@pytest.mark.parametrize("block", [SET, RIGL])
def test_a_replaced_parameter_is_followed(block):
    model = network()
    sparsity = rarefy.configure({**block, "compute": "masked", "seed": 0})
    sparsity.apply(model)
    model[0].weight = nn.Parameter(torch.randn(48, 32) * 0.1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    sparsity.apply(optimizer)
    assert_zeros(model, sparsity)
    first = model[0].weight_mask.clone()
    for step in range(6):
        step_once(model, optimizer, step)
        assert_zeros(model, sparsity)
    assert moved(model, first) > 50 and sparsity.updates == 4


@pytest.mark.parametrize("block", [SET, RIGL])
@pytest.mark.parametrize("order", ["their hook first", "ours first"])
def test_an_optimizer_that_steps_in_the_backward_pass(block, order):
    def run(in_backward):
        model = network()
        sparsity = rarefy.configure({**block, "compute": "masked", "seed": 0})
        optimizers = {parameter: torch.optim.SGD([parameter], lr=0.01) for parameter in model.parameters()}

        def step_of(parameter):
            optimizers[parameter].step()
            optimizers[parameter].zero_grad()

        def hook():
            for parameter in model.parameters() if in_backward else ():
                parameter.register_post_accumulate_grad_hook(step_of)

        if order == "their hook first":
            hook()
        sparsity.apply(model)
        for optimizer in optimizers.values():
            sparsity.apply(optimizer)
        if order != "their hook first":
            hook()
        for step in range(8):
            loss_of(model, step).backward()
            for parameter in () if in_backward else reversed(list(model.parameters())):
                step_of(parameter)
        assert_zeros(model, sparsity)
        assert (sparsity.step, sparsity.updates) == (8, 5)
        return model[0].weight_mask

    assert torch.equal(run(True), run(False))


# ---- the gradient of the step that is taken ----


@pytest.mark.parametrize("freeze", ["", "in the backward pass", "until the step is over"])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_discriminator_grows_by_its_own_loss(freeze, compute):
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32))
    critic = nn.Sequential(nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 1))
    both = nn.ModuleDict({"G": generator, "D": critic})
    sparsity = rarefy.RigL(
        0.9, update={"steps": [0, 1]}, drop_fraction=0.5, seed=0, compute=compute,
        param_filter=["D.0.weight", "G.0.weight"],
    )  # fmt: skip
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.01) for one in (generator, critic)]
    for target in (both, *optimizers):
        sparsity.apply(target)
    real, noise = torch.randn(16, 32), torch.randn(16, 8)
    weight, mask = critic[0].weight.detach().clone(), critic[0].weight_mask.clone()
    leaf = weight.clone().requires_grad_()

    def score(x, matrix):
        return critic[2](torch.relu(x @ matrix.T + critic[0].bias))

    fake = generator(noise).detach()
    (own,) = torch.autograd.grad(score(fake, leaf).mean() - score(real, leaf).square().mean(), leaf)
    (critic(fake).mean() - critic(real).square().mean()).backward()
    optimizers[1].step()
    stepped = critic[0].weight.detach().clone()
    critic.requires_grad_(not freeze)
    (100 * critic(generator(noise)).square().mean()).backward()
    critic.requires_grad_(freeze != "until the step is over")
    optimizers[0].step()
    critic.requires_grad_(True)
    dropped = round(0.5 * int(mask.sum()))
    kept = drop_lowest(mask, stepped.abs(), dropped)
    assert torch.equal(critic[0].weight_mask, grow_highest(kept, own.abs(), dropped))


class Mixed(DropAndGrow):
    """Mixes |w| and the dense gradient, so that its scale matters."""

    name = "mixed"
    needs = "dense"

    def drop_score(self, weight, gradient):
        self.seen = [*getattr(self, "seen", []), gradient.clone()]
        return weight.abs() + gradient.abs()

    def grow_score(self, weight, gradient):
        return gradient.abs()


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_loss_scale_is_taken_out_of_the_dense_gradient(compute, fused, micro_batches):
    seen, masks = [], []
    for enabled in (False, True):
        algorithm = Mixed(0.9, update={"freq": 1}, seed=0, compute=compute)
        model = network()
        algorithm.apply(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=fused)
        algorithm.apply(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=65536.0, enabled=enabled)
        for step in range(3):
            optimizer.zero_grad()
            for part in inputs(step).chunk(micro_batches):
                scaler.scale((model(part) - 1).square().mean() / micro_batches).backward()
            scaler.step(optimizer)
            scaler.update()
        seen.append(algorithm.seen)
        masks.append(model[0].weight_mask)
    for plain, scaled in zip(*seen, strict=True):
        torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-7)
    assert torch.equal(*masks)


def test_a_clipped_gradient_is_clipped_at_every_position():
    algorithm = Mixed(0.9, update={"freq": 1}, seed=0, compute="masked")
    model = network()
    algorithm.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    algorithm.apply(optimizer)
    loss_of(model).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    mask, grad = model[0].weight_mask.clone(), model[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(algorithm.seen[0][mask], grad[mask], rtol=0.02, atol=0)
    assert 0 < float(algorithm.seen[0][~mask].abs().max()) < 1e-3


@pytest.mark.parametrize("compute", ["masked", "compact"])
@pytest.mark.parametrize("reentrant", [None, True, *NOT_REENTRANT])
def test_a_layer_that_is_used_several_times_and_recomputed(reentrant, compute):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.first, self.block = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            x = self.first(x)
            for _ in range(3):
                if reentrant is None:
                    x = torch.tanh(self.block(x))
                else:
                    x = checkpoint(lambda z: torch.tanh(self.block(z)), x, use_reentrant=reentrant)
            return x

    def run(compute):
        model = Repeated()
        sparsity = rarefy.RigL(0.9, seed=0, compute=compute, update={"freq": 2})
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        sparsity.apply(model)
        sparsity.apply(optimizer)
        for step in range(6):
            step_once(model, optimizer, step)
        return model.block.weight_mask

    found, reentrant = run(compute), None
    assert torch.equal(found, run("masked"))


@pytest.mark.parametrize("algorithm", ["static", "rigl"])
def test_a_gradient_that_comes_past_the_hooks_is_refused(algorithm):
    """As in torch 2.6, where hooks on saved tensors make a sparse weight lose its own."""
    model = nn.Linear(32, 32)
    sparsity = rarefy.configure({"algorithm": algorithm, "sparsity": 0.9, "compute": "compact"})
    sparsity.apply(model)
    model(torch.ones(2, 32)).sum().backward()
    model.weight._backward_hooks.clear()
    with pytest.raises(RarefyError, match="weight of a Linear got a gradient past its hooks, which"):
        model(torch.ones(2, 32)).sum().backward()


# ---- frozen weights ----


def frozen(model, how):
    """The parameter groups of an optimizer for a model whose first layer cannot learn."""
    if "requires_grad" in how:
        model[0].requires_grad_(False)
    if "left out" in how:
        return list(model[2].parameters())
    rate = 0.0 if how == "learning rate 0" else 0.1
    return [{"params": list(model[0].parameters()), "lr": rate}, {"params": list(model[2].parameters())}]


@pytest.mark.parametrize("how", ["requires_grad", "left out", "requires_grad, left out", "learning rate 0"])
@pytest.mark.parametrize("algorithm", ["set", "rigl", "gmp"])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_frozen_weights_keep_their_topology(how, algorithm, compute):
    sparsity = {"type": "linear", "init": 0.5, "slope": 0.05} if algorithm == "gmp" else 0.8
    model = network()
    block = {"algorithm": algorithm, "sparsity": sparsity, "init_method": "topk", "update": {"freq": 1}}
    found = rarefy.configure({**block, "compute": compute, "seed": 0})
    found.apply(model)
    weight, other = model[0].weight.detach().clone(), model[2].weight_mask.clone()
    optimizer = torch.optim.SGD(frozen(model, how), lr=0.1)
    found.apply(optimizer)
    for step in range(4):
        step_once(model, optimizer, step)
    assert torch.equal(model[0].weight, weight)
    assert not torch.equal(model[2].weight_mask, other) and found.updates == 5


def test_a_weight_that_is_unfrozen_goes_on():
    model, optimizer, _ = sparse(SET, update={"freq": 1})
    model[0].requires_grad_(False)
    before = model[0].weight_mask.clone()
    step_once(model, optimizer, 0)
    assert torch.equal(model[0].weight_mask, before)
    model[0].requires_grad_(True)
    step_once(model, optimizer, 1)
    assert not torch.equal(model[0].weight_mask, before)


def test_updates_count_those_that_took_place():
    model, optimizer, sparsity = sparse(SET, update={"freq": 1})
    model.requires_grad_(False)
    optimizer.step()
    assert (sparsity.step, sparsity.updates) == (1, 1)


def test_an_update_that_cannot_have_its_gradient_says_so_once():
    model, optimizer, sparsity = sparse(EVERY)
    loss_of(model).backward()
    model[2].weight.grad = None
    sparsity.parameters["2.weight"].dense_gradient.take()
    with pytest.warns(
        UserWarning, match=r"2\.weight keeps its topology at step 1: rigl ranks by its dense gradient"
    ):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.zero_grad()
        optimizer.step()


# ---- optimizers that are missing ----


def test_no_optimizer_is_said_at_the_second_backward_pass():
    model = network()
    rarefy.RigL(0.8, seed=0).apply(model)
    loss_of(model).backward()
    with pytest.warns(
        UserWarning, match=r"has had two backward passes, and no optimizer .*sparsity\.apply\(optimizer\)"
    ):
        loss_of(model).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_of(model).backward()


def test_updates_by_hand_need_no_optimizer():
    model = network()
    sparsity = rarefy.SET(0.8, seed=0)
    sparsity.autoupdate = False
    sparsity.apply(model)
    before = model[0].weight_mask.clone()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(3):
            loss_of(model).backward()
    updates = sparsity.updates
    sparsity.update()
    assert sparsity.updates == updates + 1 and not torch.equal(model[0].weight_mask, before)


def test_the_many_gradients_of_one_step_of_lbfgs_are_no_lost_optimizer():
    model = network()
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=20, tolerance_change=0)
    sparsity = rarefy.configure(SET)
    sparsity.apply(model)
    sparsity.apply(optimizer)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        calls.append(loss.detach())
        return loss

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step(closure)
    assert len(calls) > 10


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_an_optimizer_that_no_longer_steps_is_said_once(set_to_none, compute):
    model, optimizer, _ = sparse(SET, compute=compute)
    step_once(model, optimizer, 0)
    replaced = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=r"has had 10 gradients since a followed optimizer stepped last"
    ) as caught:
        for step in range(24):
            replaced.zero_grad(set_to_none)
            loss_of(model, step).backward()
            replaced.step()
    assert len(caught) == 1


@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_many_micro_batches_are_no_lost_optimizer(compute):
    model, optimizer, sparsity = sparse(SET, compute=compute)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(24):
            loss_of(model, step).backward()
        optimizer.step()
    assert sparsity.step == 1


@pytest.mark.filterwarnings("error")
def test_an_optimizer_of_other_parameters_steps_between_micro_batches():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    # Adafactor does not leave zeros as they are, so they are put in place after its steps.
    optimizers = [
        torch.optim.SGD([model[0].weight, model[1].weight], lr=0.1),
        torch.optim.Adafactor([model[0].bias, model[1].bias]),
    ]
    sparsity = rarefy.Static(0.5, compute="masked")
    sparsity.apply(model)
    for optimizer in optimizers:
        sparsity.apply(optimizer)
    # More passes than gradients that nobody uses are given time for.
    for batch in range(40):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizers[1].step()
        if batch % 20 == 19:
            optimizers[0].step()
            optimizers[0].zero_grad()
    assert sparsity.step == 2
