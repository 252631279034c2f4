"""RigL with one backward pass per step holds a part of each dense gradient, and decides as if it held all of it."""

from __future__ import annotations

import pickle
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import rarefy
from helpers import assert_identical, snapshot
from rarefy import RigL
from rarefy.errors import RarefyError
from rarefy.masks import drop_lowest
from rarefy.schedules import Constant
from rarefy.storage.gradients import Shortlist
from rarefy.storage.ranking import highest_entries, ranked_in_place
from rarefy.tensors import SparseWeight
from rarefy.trainer.trainer import Trainer

ANNEALED = {"type": "cosine", "init": 0.6, "half_period": 9}


def layers(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(24, 32), nn.Tanh(), nn.Linear(32, 8, bias=False))


def prepare(accumulates=False, model=None, algorithm=RigL, compute="compact", **changes):
    model = layers() if model is None else model
    options = {"update": {"freq": 2}, "drop_fraction": ANNEALED, "seed": 1, "compute": compute, **changes}
    sparsity = algorithm(options.pop("sparsity", 0.9), **options)
    sparsity.accumulates = accumulates
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def backward(model, step):
    x = torch.randn(6, 24, generator=torch.Generator().manual_seed(step))
    (model(x) - x[:, :8]).square().mean().backward()


def learn(model, optimizer, step):
    optimizer.zero_grad()
    backward(model, step)
    optimizer.step()


def held(sparsity, name="0.weight"):
    return sparsity.parameters[name].dense_gradient.value


# ---- the same masks ------------------------------------------------------------------------------------------------

ENTRIES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, float("nan"), float("inf"), -float("inf")])


def after_update(accumulates: bool, grad: Tensor, weight: Tensor, **options) -> tuple[Tensor, object]:
    """The mask that one update makes from a given dense gradient, and what was held of the gradient before."""
    rows, columns = grad.shape
    model = nn.Sequential(nn.Linear(columns, rows, bias=False))
    model, sparsity, _ = prepare(accumulates, model, update={"freq": 1}, **options)
    parameter = sparsity.parameters["0.weight"]
    gradient = parameter.dense_gradient
    gradient.arrive(grad.clone())
    gradient.pair()
    before = gradient.value
    if parameter.storage.kind == "compact":
        parameter.weight.data.copy_(weight)
    else:
        parameter.weight.data.copy_(weight.masked_fill(~parameter.mask, 0))
    sparsity.step = 1
    sparsity.update()
    return model[0].weight_mask, before


@given(
    shape=st.tuples(st.integers(1, 10), st.integers(1, 12)),
    balance=st.tuples(st.sampled_from(["balance_in_groups", "balance_out_groups"]), st.integers(1, 3)),
    entries=st.lists(ENTRIES, min_size=1, max_size=4),
    sparsity=st.lists(st.floats(0.6, 0.99), min_size=2, max_size=2),
    drop_fraction=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150)
def test_any_gradient_gives_the_same_mask(shape, balance, entries, sparsity, drop_fraction, seed):
    side, groups = balance
    rows, columns = shape if side == "balance_out_groups" else shape[::-1]
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(entries), (2, rows * groups, columns), generator=generator)
    grad, weight = torch.tensor(entries)[picks]
    if side == "balance_in_groups":
        grad, weight = grad.t(), weight.t()
    options = {side: groups, "sparsity": sparsity, "drop_fraction": drop_fraction}
    whole, _ = after_update(True, grad, weight, **options)
    part, _ = after_update(False, grad, weight, **options)
    assert torch.equal(part, whole)


@pytest.mark.parametrize("drop_fraction", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("target", [0.85, 0.9, 0.98])
@pytest.mark.parametrize("fill", [0.0, float("nan")])
def test_a_shortlist_of_ties_gives_the_same_mask(drop_fraction, target, fill):
    grad = torch.full((16, 30), fill)
    grad[3:5, ::2] = torch.tensor([1.0, -1.0])[:, None]
    weight = torch.ones_like(grad)
    options = {"sparsity": [0.9, target], "drop_fraction": drop_fraction, "balance_in_groups": 3}
    whole, everything = after_update(True, grad, weight, **options)
    part, _ = after_update(False, grad, weight, **options)
    assert isinstance(everything, Tensor)
    assert torch.equal(part, whole)


class PlainRigL(RigL):
    """Ranks dense tensors in whole: what was said of RigL holds for no subclass."""


class DropLargest(PlainRigL):
    grows_by_gradient_alone = True

    def drop_score(self, weight, dense_grad):
        return -weight.abs()


class PlainDropLargest(DropLargest):
    pass


class KeepAll(PlainRigL):
    grows_by_gradient_alone = True

    def update_mask(self, weight, mask, sparsity, dense_grad):
        return mask


class PlainKeepAll(KeepAll):
    pass


@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 12) | st.just(400)),
    entries=st.lists(ENTRIES, min_size=1, max_size=4),
    sparsity=st.lists(st.floats(0.3, 0.99) | st.just(0.0), min_size=2, max_size=2),
    drop_fraction=st.sampled_from([0.0, 0.3, 0.7, 1.0]),
    compute=st.sampled_from(["compact", "masked"]),
    accumulates=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(max_examples=200)
def test_connections_ranked_one_by_one_give_the_mask_of_dense_tensors(
    shape, entries, sparsity, drop_fraction, compute, accumulates, seed
):
    picks = torch.randint(len(entries), (2, *shape), generator=torch.Generator().manual_seed(seed))
    grad, weight = torch.tensor(entries)[picks]
    options = {"sparsity": sparsity, "drop_fraction": drop_fraction}
    plain, _ = after_update(True, grad, weight, algorithm=PlainRigL, **options)
    short, _ = after_update(accumulates, grad, weight, compute=compute, **options)
    assert torch.equal(short, plain)


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("fill", [None, 0.5, float("nan")])
@pytest.mark.parametrize(
    ("ours", "plain"), [(RigL, PlainRigL), (DropLargest, PlainDropLargest), (KeepAll, PlainKeepAll)]
)
def test_ties_over_several_panels_and_rules_of_a_subclass(ours, plain, fill, accumulates):
    grad, weight = torch.randn(2, 8, 500, generator=torch.Generator().manual_seed(0))
    if fill is not None:
        weight[:, ::2], weight[::2] = fill, fill
    masks = [after_update(accumulates, grad, weight, algorithm=one)[0] for one in (ours, plain)]
    assert torch.equal(*masks)


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize("compute", ["compact", "masked"])
def test_a_rule_that_an_instance_was_given(compute, accumulates):
    def patched(kind, *args, **options):
        algorithm = kind(*args, **options)
        algorithm.grow_score = lambda weight, grad: grad.abs() + 100 * weight.abs()
        return algorithm

    grad, weight = torch.randn(2, 8, 500, generator=torch.Generator().manual_seed(0))
    short, plain = (
        after_update(accumulates, grad, weight, algorithm=partial(patched, kind), compute=compute)[0]
        for kind in (RigL, PlainRigL)
    )
    assert torch.equal(short, plain)


def conv1d_layers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers.pytorch_utils import Conv1D
    torch.manual_seed(0)
    return nn.Sequential(Conv1D(32, 24), nn.Tanh(), Conv1D(8, 32))


@pytest.mark.parametrize("make", [layers, conv1d_layers])
@pytest.mark.parametrize("sparsity", [0.9, [0.95, 0.8, 0.9]])
def test_a_run_is_the_same_to_the_last_bit(make, sparsity):
    ends = []
    for accumulates in (True, False):
        model, algorithm, optimizer = prepare(accumulates, make(), sparsity=sparsity)
        kinds = set()
        algorithm.register_target_sparsity_hook(
            lambda algorithm, name, value, kinds=kinds: kinds.add(type(held(algorithm, name)))
        )
        for step in range(10):
            learn(model, optimizer, step)
        assert kinds == {Tensor if accumulates else Shortlist}
        ends.append(snapshot(model, optimizer))
    assert_identical(*ends)


@pytest.mark.parametrize("make", [layers, conv1d_layers])
@pytest.mark.parametrize("values", [torch.arange(76.0), torch.ones(76)])
def test_the_best_active_connections_are_those_of_the_dense_weight(make, values):
    parameter = prepare(model=make(), sparsity=0.9)[1].parameters["0.weight"]
    parameter.weight.entries[:76] = values
    expected = drop_lowest(parameter.mask, parameter.dense_weight().abs(), parameter.active - 30)
    assert torch.equal(parameter.keep_top(torch.abs, 30), expected)


# ---- when everything is kept ---------------------------------------------------------------------------------------


class SignedRigL(RigL):
    """Grows by the signed gradient, times the weight's row: no score of the gradient's size alone."""

    def grow_score(self, weight, dense_grad):
        return dense_grad * weight.sum(1, keepdim=True)


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, Shortlist),
        ({"algorithm": SignedRigL}, Tensor),
        ({"accumulates": True}, Tensor),
        ({"sparsity": lambda step: 0.9}, Tensor),
        ({"drop_fraction": lambda step: 0.3}, Tensor),
        ({"sparsity": 0.5}, Tensor),
        ({"compute": "masked"}, Tensor),
    ],
)
def test_what_is_held_from_the_backward_pass_to_the_update(changes, kind):
    model, sparsity, optimizer = prepare(**changes)
    learn(model, optimizer, 0)
    backward(model, 1)
    assert type(held(sparsity)) is kind


def test_everything_is_held_while_updates_are_called_by_hand():
    model, sparsity, _ = prepare()
    sparsity.autoupdate = False
    backward(model, 0)
    assert isinstance(held(sparsity), Tensor)


def test_a_shortlist_is_a_small_part_of_the_gradient():
    model, sparsity, _ = prepare(update={"freq": 1}, drop_fraction=0.3)
    backward(model, 0)
    shortlist, size = held(sparsity), 24 * 32
    assert shortlist.counts == [23] and 23 <= len(shortlist.places) < 23 + 77
    assert shortlist.places.dtype == torch.int32 and len(shortlist.places) * 8 < 0.2 * size * 4
    scores = shortlist.entries.abs()
    is_new = ~sparsity.parameters["0.weight"].mask.flatten()[shortlist.places.long()]
    assert is_new.sum() == 23 and (scores >= scores[is_new].min()).all()


def test_scores_of_another_dtype_are_not_written_over_the_gradient():
    grad = torch.tensor([-1.0, 2.0], dtype=torch.bfloat16)
    assert torch.equal(ranked_in_place(grad, lambda part: part.float() / 3), torch.tensor([-1.0, 2.0]) / 3)
    assert grad.tolist() == [-1.0, 2.0]


@pytest.mark.parametrize("shape", [(7, 9), (40, 8192), (300_000,)])
@pytest.mark.parametrize("count", [0, 1, 20])
def test_the_list_has_at_least_the_highest_inactive_entries(shape, count):
    generator = torch.Generator().manual_seed(count)
    grad, mask = torch.randn(shape, generator=generator), torch.rand(shape, generator=generator) < 0.3
    listed = highest_entries(grad, mask, count, torch.abs)
    inactive = grad[~mask].abs().sort(descending=True).values
    assert int((listed & ~mask).sum()) >= count
    assert torch.equal(listed, grad.abs() >= (inactive[listed[~mask].sum() - 1] if count else torch.inf))
    assert listed[~mask].sum() <= (count if grad.numel() < 100 else grad.numel() // 100)


def test_ties_are_listed_together():
    grad, mask = torch.tensor([2.0, 1.0, -1.0, 1.0, 0.0]), torch.tensor([False, True, False, False, False])
    assert highest_entries(grad, mask, 2, torch.abs).tolist() == [True, True, True, True, False]


@pytest.mark.parametrize("entries", [[float("nan")] * 3, [1.0, float("nan"), 0.0]])
def test_everything_is_listed_where_nan_may_be_grown(entries):
    mask = torch.zeros(3, dtype=torch.bool)
    assert highest_entries(torch.tensor(entries), mask, 2, torch.abs).all()


def test_a_list_that_saves_nothing_is_not_made():
    grad = torch.zeros(8, 16)
    assert isinstance(after_update(False, grad, grad)[1], Tensor)


# ---- the promise and its limits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["compact", "masked"])
def test_a_second_backward_pass_is_refused(then):
    model, sparsity, optimizer = prepare(update={"freq": 1})
    backward(model, 0)
    sparsity.parameters["0.weight"].become(then, [optimizer])
    with pytest.raises(RarefyError, match=r"second backward pass .* set accumulates = True on the sparsity"):
        backward(model, 1)


def test_a_step_that_is_given_up_may_be_repeated():
    model, sparsity, optimizer = prepare(update={"freq": 1})
    before = sparsity.parameters["0.weight"].mask
    backward(model, 0)
    learn(model, optimizer, 1)
    assert not torch.equal(before, sparsity.parameters["0.weight"].mask)


@pytest.mark.parametrize(
    ("name", "schedule"),
    [("drop_fraction", Constant(0.9)), ("sparsity", Constant(0.1))],
)
def test_schedules_that_change_between_backward_pass_and_update_are_refused(name, schedule):
    model, sparsity, optimizer = prepare(update={"freq": 1})
    backward(model, 0)
    setattr(sparsity, name, schedule)
    with pytest.raises(RarefyError, match=r"of 0\.weight was .* set accumulates = True"):
        optimizer.step()


def test_an_update_by_hand_before_the_step_finds_enough():
    shrinking = {"type": "linear", "init": 0.9, "slope": -0.4}
    runs = [
        prepare(accumulates, update={"freq": 1}, drop_fraction=shrinking) for accumulates in (True, False)
    ]
    for model, sparsity, _ in runs:
        backward(model, 0)
        sparsity.update()
    (whole, *_), (short, *_) = runs
    assert_identical(snapshot_of_masks(short), snapshot_of_masks(whole))


def snapshot_of_masks(model):
    return {name: value for name, value in model.state_dict().items() if name.endswith("_mask")}


def give_gradients(source, target):
    """Gives a model the gradients of one with compact storage."""
    for ours, theirs in zip((target[0], target[2]), (source[0], source[2]), strict=True):
        grad = theirs.weight.grad.dense()
        if isinstance(ours.weight, SparseWeight):
            ours.weight.grad = grad
        else:
            ours.weight.grad = grad
    target[0].bias.grad = source[0].bias.grad.clone()


@pytest.mark.parametrize("compute", ["compact", "masked"])
def test_a_state_saved_before_the_update_goes_on_exactly(compute):
    model, sparsity, optimizer = prepare(update={"freq": 1})
    learn(model, optimizer, 0)
    optimizer.zero_grad()
    backward(model, 1)
    state = model.state_dict(), optimizer.state_dict(), sparsity.state_dict()
    other, again, other_optimizer = prepare(model=layers(seed=7), update={"freq": 1}, compute=compute)
    for target, part in zip((other, other_optimizer, again), pickle.loads(pickle.dumps(state)), strict=True):
        target.load_state_dict(part)
    assert isinstance(held(again), Shortlist)
    give_gradients(model, other)
    before = other.state_dict()["0.weight_mask"].clone()
    for one in (optimizer, other_optimizer):
        one.step()
    assert_identical(dict(other.state_dict()), dict(model.state_dict()))
    assert not torch.equal(before, other.state_dict()["0.weight_mask"])


def test_a_saved_state_does_not_change_with_the_run():
    model, sparsity, _ = prepare(update={"freq": 1})
    backward(model, 0)
    saved = sparsity.state_dict()["dense_gradients"]["0.weight"]
    held(sparsity).entries.zero_()
    assert saved["entries"].any()
    sparsity.load_state_dict(sparsity.state_dict() | {"dense_gradients": {"0.weight": saved}})
    held(sparsity).entries.zero_()
    assert saved["entries"].any()


def test_a_group_passes_it_on():
    block = {"algorithm": "rigl", "sparsity": 0.9}
    group = rarefy.configure([{**block, "param_filter": "0.*"}, {**block, "param_filter": "2.*"}])
    assert group.accumulates
    group.accumulates = False
    assert [algorithm.accumulates for algorithm in group.algorithms] == [False, False]
    group.algorithms[0].accumulates = True
    assert group.accumulates


@pytest.mark.parametrize("grad_accum_steps", [1, 3])
def test_the_trainer_knows_its_micro_batches(tmp_path, grad_accum_steps):
    trainer = Trainer(
        model_dir=tmp_path, model=layers, device="cpu", sparsity=0.9, loggers=[],
        loop={"num_steps": 1, "grad_accum_steps": grad_accum_steps},
    )  # fmt: skip
    assert trainer.sparsity.accumulates is (grad_accum_steps > 1)
