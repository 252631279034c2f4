"""Trainings in phases: optimizers that come later, and optimizers that are used no longer."""

# Modules and tensors are asked for attributes that their types do not tell.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportCallIssue=false

from __future__ import annotations

import warnings

import pytest
import torch

import rarefy
from foreign.networks import RIGL, network, step_once
from rarefy.algorithms.attachment.step_watch import Absence

STORAGES = pytest.mark.parametrize("storage", ["masked", "compact"])


def begun(storage, *parts):
    """A model after four steps of an optimizer for each of its parts."""
    model = network()
    sparsity = rarefy.configure({**RIGL, "compute": storage, "seed": 0})
    sparsity.apply(model)
    optimizers = [torch.optim.SGD(part(model), lr=0.1) for part in parts]
    for optimizer in optimizers:
        sparsity.apply(optimizer)
    for step in range(4):
        step_all(model, optimizers, step)
    return model, sparsity, optimizers


def step_all(model, optimizers, step):
    model.zero_grad()
    step_once(model, optimizers[0], step)
    for optimizer in optimizers[1:]:
        optimizer.step()


def everything(model):
    return model.parameters()


def body(model):
    return model[0].parameters()


def head(model):
    return model[2].parameters()


def masks(sparsity):
    return [parameter.mask.clone() for parameter in sparsity.parameters.values()]


@STORAGES
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_head_that_is_trained_on_goes_on_alone(storage, is_frozen):
    model, sparsity, _ = begun(storage, everything)
    model[0].requires_grad_(not is_frozen)
    last = torch.optim.SGD(head(model), lr=0.1)
    sparsity.apply(last)
    before = masks(sparsity)
    for step in range(4):
        step_once(model, last, step)
    after = masks(sparsity)
    assert sparsity.step == 8
    assert torch.equal(before[0], after[0]), "what no optimizer in use trains keeps its topology"
    assert not torch.equal(before[1], after[1])


def test_the_first_optimizer_counts_again_once_it_steps():
    model, sparsity, (first,) = begun("masked", everything)
    second = torch.optim.SGD(head(model), lr=0.1)
    sparsity.apply(second)
    step_once(model, second, 0)
    before = masks(sparsity)
    for step in range(3):
        step_once(model, first, step)
    assert sparsity.step == 8
    assert not torch.equal(before[0], masks(sparsity)[0])


def test_a_second_optimizer_that_was_there_from_the_start_is_waited_for():
    model, sparsity, (first, second) = begun("masked", everything, head)
    assert sparsity.step == 4
    for step in range(3):
        step_once(model, second, step)
    assert sparsity.step == 4
    step_once(model, first, 0)
    assert sparsity.step == 5


@STORAGES
def test_a_part_whose_optimizer_is_used_no_longer_is_named_and_left_out(storage):
    model, sparsity, (first, second) = begun(storage, body, head)
    before = masks(sparsity)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(999):
            step_once(model, second, step)
    assert sparsity.step == 4
    with pytest.warns(UserWarning, match=r"0\.weight: no optimizer has trained it for 1000 steps of others"):
        step_once(model, second, 0)
    step_once(model, second, 1)
    assert sparsity.step == 6
    assert torch.equal(before[0], masks(sparsity)[0])
    assert not torch.equal(before[1], masks(sparsity)[1])
    step_all(model, (first, second), 0)
    step_all(model, (first, second), 1)
    assert sparsity.step == 8
    assert not torch.equal(before[0], masks(sparsity)[0])


@pytest.mark.parametrize("is_noted", [False, True])
def test_an_optimizer_that_steps_again_trains_from_its_first_step(is_noted):
    """Also where the weights have another form within a step, and stay to the last bit if the step changes nothing."""
    model = network()
    rise = {"type": "polynomial", "init": 0.3, "final": 0.5, "start": 0, "stop": 5000}
    sparsity = rarefy.configure({"algorithm": "powerprop", "sparsity": rise, "update": {"freq": 1000}})
    sparsity.apply(model)
    first = torch.optim.SGD(body(model) if is_noted else everything(model), lr=0.1)
    second = torch.optim.SGD(head(model), lr=0.1)
    sparsity.apply(first)
    step_once(model, first, 0)
    sparsity.apply(second)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for step in range(1001 if is_noted else 1):
            step_once(model, second, step)
    before = model[0].weight.detach().clone()
    step_once(model, first, 1)
    assert not torch.equal(before, model[0].weight)


def test_weights_that_have_an_optimizer_each_are_not_absent():
    absence = Absence()
    names = [str(number) for number in range(150)]
    for _ in range(3):
        for turn in names:
            absence.saw_step({name: name == turn for name in names})
    assert not any(map(absence.is_noted, names))


@STORAGES
def test_a_critic_of_a_hundred_steps_a_generator_step_holds_no_count_back(storage):
    model, sparsity, (first, second) = begun(storage, body, head)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(300):
            step_once(model, second, step)
            if step % 100 == 99:
                step_once(model, first, step)
    assert sparsity.step == 7


@STORAGES
def test_a_frozen_body_is_not_waited_for(storage):
    model, sparsity, (_, second) = begun(storage, body, head)
    before = masks(sparsity)
    model[0].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(6):
            step_once(model, second, step)
    assert sparsity.step == 10
    assert torch.equal(before[0], masks(sparsity)[0])


@STORAGES
@pytest.mark.parametrize("steps", [3, 1010])
@pytest.mark.filterwarnings("ignore:0.weight. no optimizer has trained it:UserWarning")
def test_a_resumed_run_waits_no_longer_than_one_that_went_on(storage, steps):
    model, sparsity, (first, second) = begun(storage, body, head)
    for step in range(steps):
        step_once(model, second, step)
    other, resumed, (third, fourth) = begun(storage, body, head)
    other.load_state_dict(model.state_dict())
    for mine, theirs in ((first, third), (second, fourth)):
        theirs.load_state_dict(mine.state_dict())
    resumed.load_state_dict(sparsity.state_dict())
    for step in range(8):
        for network_, optimizer in ((model, second), (other, fourth)):
            step_once(network_, optimizer, step)
    step_once(model, first, 0)
    step_once(other, third, 0)
    assert resumed.step == sparsity.step
    assert all(map(torch.equal, masks(resumed), masks(sparsity)))
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


@STORAGES
def test_a_resumed_run_knows_which_optimizer_is_used_no_longer(storage):
    model, sparsity, (first,) = begun(storage, everything)
    second = torch.optim.SGD(head(model), lr=0.1)
    sparsity.apply(second)
    step_once(model, second, 0)
    other, resumed, (third, fourth) = begun(storage, everything, head)
    other.load_state_dict(model.state_dict())
    for mine, theirs in ((first, third), (second, fourth)):
        theirs.load_state_dict(mine.state_dict())
    resumed.load_state_dict(sparsity.state_dict())
    for step in range(4):
        for network_, optimizer in ((model, second), (other, fourth)):
            step_once(network_, optimizer, step)
    assert resumed.step == sparsity.step == 9
    assert all(map(torch.equal, masks(resumed), masks(sparsity)))


def resumed(storage, model, sparsity, follows_first, *parts):
    """Another run that goes on from these; its optimizers are followed before the state is loaded, or after it."""
    other = network()
    again = rarefy.configure({**RIGL, "compute": storage, "seed": 0})
    again.apply(other)
    optimizers = [torch.optim.SGD(part(other), lr=0.1) for part in parts]
    other.load_state_dict(model.state_dict())
    for optimizer in optimizers if follows_first else []:
        again.apply(optimizer)
    again.load_state_dict(sparsity.state_dict())
    for optimizer in optimizers:
        again.apply(optimizer)
    return other, again, optimizers


@STORAGES
@pytest.mark.parametrize("follows_first", [False, True])
def test_a_phase_that_begins_with_a_resumed_run_waits_for_nobody(storage, follows_first):
    model, sparsity, _ = begun(storage, everything)
    other, again, _ = resumed(storage, model, sparsity, follows_first, everything)
    for one, policy in ((model, sparsity), (other, again)):
        optimizer = torch.optim.SGD(head(one), lr=0.1)
        policy.apply(optimizer)
        for step in range(5):
            one.zero_grad()
            step_once(one, optimizer, step)
    assert again.step == sparsity.step == 9
    assert all(map(torch.equal, masks(again), masks(sparsity)))


@pytest.mark.parametrize("follows_first", [False, True])
def test_optimizers_that_share_weights_are_waited_for_in_a_resumed_run_too(follows_first):
    model, sparsity, optimizers = begun("masked", everything, head)
    other, again, others = resumed("masked", model, sparsity, follows_first, everything, head)
    for one, policy, (_, of_head) in ((model, sparsity, optimizers), (other, again, others)):
        before = policy.step
        one.zero_grad()
        step_once(one, of_head, 0)
        assert policy.step == before
