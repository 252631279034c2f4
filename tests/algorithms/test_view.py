"""What algorithms are shown and asked: forms of `update_mask`, gradients, state of their own, forward masks."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import rarefy
from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.algorithms.view import WeightView, arguments_of
from rarefy.errors import RarefyError
from rarefy.storage.gradients import Shortlist

both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    x = torch.randn(10, 12, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
    return (model(x) - x[:, :8].sin()).square().mean()


def prepare(algorithm: Any, model: nn.Module | None = None, optimizer: Any = torch.optim.SGD, **options: Any):
    model = network() if model is None else model
    optimizer = optimizer(model.parameters(), lr=0.1, **options)
    algorithm.apply(model)
    algorithm.apply(optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for step in range(start, start + steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


# ---- forms of update_mask ----


class ByView(rarefy.DynamicSparsityAlgorithm):
    def update_mask(self, view):
        return self.keep_top(view.weight.abs(), view.sparsity)


class ByFour(rarefy.DynamicSparsityAlgorithm):
    def update_mask(self, weight, mask, sparsity, dense_grad):
        return self.keep_top(weight.abs(), sparsity)


class ByThree(rarefy.DynamicSparsityAlgorithm):
    def update_mask(self, p, mask, sparsity):
        return self.keep_top(p.abs(), sparsity)


class ByParent(rarefy.GMP):
    def __init__(self, sparsity, **options):
        super().__init__([sparsity, sparsity], **options)

    def update_mask(self, weight, mask, sparsity, dense_grad=None):
        return super().update_mask(weight, mask, sparsity, dense_grad)


@pytest.mark.parametrize("kind", [ByView, ByFour, ByThree, ByParent])
@pytest.mark.parametrize("balance", [{}, {"balance_out_groups": 4}])
def test_every_form_is_called_with_the_same_weight(kind, balance):
    model, optimizer = prepare(kind(0.75, seed=0, update={"freq": 1}, **balance))
    other, other_optimizer = prepare(ByView(0.75, seed=0, update={"freq": 1}, **balance))
    for one in ((model, optimizer), (other, other_optimizer)):
        train(*one, 3)
    assert torch.equal(model[0].weight, other[0].weight) and int(model[0].weight_mask.sum()) == 48


def test_the_form_with_three_arguments_finds_the_gradient_at_the_parameter():
    seen = []

    class Reference(rarefy.DynamicSparsityAlgorithm):
        needs_dense_grad = True

        def update_mask(self, p, mask, sparsity):
            seen.append(p.grad)
            return mask

    train(*prepare(Reference(0.5, seed=0, compute="masked")), 1)
    assert [int((grad != 0).sum()) for grad in seen] == [16 * 12, 16 * 8]


@pytest.mark.parametrize(
    ("function", "count"),
    [
        (lambda view: view.mask, 1),
        (lambda view, *older: view.mask, 1),
        (lambda view, scale=2: view.mask, 1),
        (lambda p, mask, sparsity: mask, 3),
        (lambda weight, mask, sparsity, dense_grad=None: mask, 4),
        (lambda *arguments: arguments[1], 4),
    ],
)
def test_the_form_is_read_from_the_signature(function, count):
    assert arguments_of(function) == count


def test_a_class_of_no_form_is_refused_when_it_is_constructed():
    class Two(rarefy.DynamicSparsityAlgorithm):
        def update_mask(self, weight, mask):
            return mask

    class Named(rarefy.DynamicSparsityAlgorithm):
        def update_mask(self, view, *, scale):
            return view.mask

    for kind in (Two, Named):
        with pytest.raises(
            RarefyError, match=rf"{kind.__name__}\.update_mask\(.*write update_mask\(self, view\) or"
        ):
            kind(0.5)


def test_a_class_that_makes_no_masks_is_refused_when_it_is_constructed():
    class Plain(rarefy.SparsityAlgorithm):
        pass

    class Half(rarefy.DynamicSparsityAlgorithm):
        pass

    class Scoreless(DropAndGrow):
        pass

    for kind, missing in (
        (Plain, "lacks update;"),
        (Half, "lacks update_mask;"),
        (Scoreless, "write grow_score"),
    ):
        with pytest.raises(RarefyError, match=f"{kind.__name__} cannot .*{missing}"):
            kind(0.5)


# ---- gradients ----


def test_needs_and_its_older_name_say_the_same():
    class Older(ByView):
        needs_dense_grad = True

    class Newer(ByView):
        needs = "dense"

    class Back(Older):
        needs_dense_grad = False

    assert (Older.needs, Newer.needs_dense_grad, Back.needs, ByView.needs) == ("dense", True, "none", "none")
    with pytest.raises(
        RarefyError, match=r"Wrong.needs: 'all' is not allowed; give one of none, active, dense"
    ):
        type("Wrong", (ByView,), {"needs": "all"})


class ByActive(rarefy.SET):
    """MEST, in short; keeps what it was given."""

    needs = "active"

    def drop_score(self, weight, gradient):
        self.seen = getattr(self, "seen", [])
        self.seen.append(gradient.clone())
        return weight.abs() + gradient.abs()


@both_storages
def test_the_gradient_of_active_connections_is_the_one_of_the_step(compute):
    algorithm = ByActive(0.75, seed=0, update={"freq": 1}, compute=compute)
    model, optimizer = prepare(algorithm)
    mask, dense = model[0].weight_mask.clone(), model[0].weight.detach().clone()
    plain = network()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.endswith("mask")})
    loss_of(plain, 0).backward()
    train(model, optimizer, 1)
    expected = torch.where(mask, plain[0].weight.grad, 0)
    torch.testing.assert_close(algorithm.seen[0], expected, rtol=1e-9, atol=1e-12)
    assert not dense[~mask].any()


@both_storages
def test_no_dense_gradient_is_collected_for_active_ones(compute):
    algorithm = ByActive(0.75, seed=0, update={"freq": 1}, compute=compute)
    model, optimizer = prepare(algorithm)
    loss_of(model, 0).backward()
    for parameter in algorithm.parameters.values():
        assert parameter.dense_gradient.value is None
        assert compute == "masked" or parameter.weight._cell.collect is None
    optimizer.step()
    assert algorithm.seen


@both_storages
def test_without_gradient_an_update_keeps_the_topology(compute):
    algorithm = ByActive(0.75, seed=0, update={"freq": 1}, compute=compute)
    model, optimizer = prepare(algorithm)
    before = model[0].weight_mask.clone()
    model[0].requires_grad_(False)
    train(model, optimizer, 2)
    assert torch.equal(model[0].weight_mask, before) and len(algorithm.seen) == 2


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_taken_out_of_what_algorithms_see(fused):
    scaled, plain = [], []
    for seen, factor in ((plain, 1.0), (scaled, 1024.0)):
        torch.manual_seed(0)
        algorithm = Averages(0.75, seed=0, update={"freq": 1}, compute="masked")
        active = ByActive(0.75, seed=0, update={"freq": 1}, compute="masked", param_filter="2.weight")
        algorithm.globs = ("0.weight",)
        model = network()
        group = rarefy.Group([algorithm, active])
        model, optimizer = prepare(group, model, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=factor)
        for step in range(2):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update()
        seen += [*active.seen, algorithm.parameters["0.weight"].state.entries["average"]]
    for one, other in zip(plain, scaled, strict=True):
        torch.testing.assert_close(one, other)


# ---- a rule for each entry of the gradient ----


class Mine(rarefy.RigL):
    pass


class Louder(rarefy.RigL):
    def gradient_score(self, gradient):
        return 2 * gradient.abs()


class Otherwise(rarefy.RigL):
    def grow_score(self, weight, dense_grad):
        return dense_grad * weight.abs().sum(1, keepdim=True)


class DropsByGradient(rarefy.RigL):
    def drop_score(self, weight, dense_grad):
        return (weight * dense_grad).abs()


@pytest.mark.parametrize(
    ("kind", "held"),
    [(Mine, Shortlist), (Louder, Shortlist), (Otherwise, torch.Tensor), (DropsByGradient, torch.Tensor)],
)
def test_a_subclass_of_rigl_holds_no_more_than_its_rule_needs_and_no_less(kind, held):
    masks = []
    for accumulates in (True, False):
        algorithm = kind(0.9, seed=0, update={"freq": 1}, compute="compact")
        algorithm.accumulates = accumulates
        model, optimizer = prepare(algorithm)
        train(model, optimizer, 4)
        optimizer.zero_grad()
        loss_of(model, 4).backward()
        assert isinstance(
            algorithm.parameters["0.weight"].dense_gradient.value, torch.Tensor if accumulates else held
        )
        optimizer.step()
        masks.append(model[0].weight_mask)
    assert torch.equal(*masks)


def test_a_rule_for_entries_needs_the_dense_gradient():
    class Forgetful(DropAndGrow):
        def gradient_score(self, gradient):
            return gradient.abs()

    with pytest.raises(RarefyError, match=r'Forgetful.gradient_score ranks by .*; set needs = "dense"'):
        Forgetful(0.5)


# ---- state of one's own ----


class Averages(rarefy.SET):
    """Drops by a moving average of |w·g|; new connections start at the value of 0.25."""

    connection_state: ClassVar = {"average": 0.25}

    def observe(self, view):
        view.state["average"].mul_(0.9).add_((view.weight * view.gradient).abs(), alpha=0.1)

    def update_mask(self, view):
        self.starts = getattr(self, "starts", [])
        self.starts.append(view.state["average"][~view.mask].unique().tolist())
        score = view.state["average"].masked_fill(~view.mask, -1)
        return self.pattern.structure.drop_and_grow(
            view.mask, score, torch.rand(view.weight.shape, generator=view.generator), view.sparsity, 0.3
        )


@both_storages
@pytest.mark.parametrize(
    "balance", [{}, {"balance_out_groups": 4}, {"balance_in_groups": 2}, {"pattern": {"n": 2, "m": 4}}]
)
def test_state_moves_with_the_topology(compute, balance):
    sparsity = 0.5 if "pattern" in balance else 0.75
    algorithm = Averages(sparsity, seed=0, update={"freq": 2}, compute=compute, **balance)
    model, optimizer = prepare(algorithm)
    mask = model[0].weight_mask.clone()
    average = torch.full((16, 12), 0.25, dtype=torch.float64)
    for step in range(8):
        weight = torch.zeros(16, 12, dtype=torch.float64).copy_(model[0].weight.detach())
        optimizer.zero_grad()
        loss_of(model, step).backward()
        layer = model[0]
        grad = layer.weight.grad.dense() if compute == "compact" else layer.weight.grad
        average = torch.where(mask, 0.9 * average + 0.1 * (weight * grad).abs(), 0.25)
        optimizer.step()
        new = model[0].weight_mask.clone()
        average = torch.where(new & mask, average, 0.25)
        mask = new
        found = algorithm.parameters["0.weight"].dense_state()["average"]
        torch.testing.assert_close(found, average, rtol=1e-9, atol=1e-12)
    assert {value for start in algorithm.starts for value in start} == {0.25}


def add_one(state):
    state["age"].add_(1)


def assign_one_more(state):
    state["age"] = state["age"] + 1


@both_storages
@pytest.mark.parametrize("write", [add_one, assign_one_more])
@pytest.mark.parametrize("moment", ["update", "observe"])
def test_what_an_algorithm_writes_to_its_state_stays(compute, write, moment):
    class Counts(ByView):
        connection_state: ClassVar = {"age": 0.0}

        def update_mask(self, view):
            if moment == "update":
                write(view.state)
            return super().update_mask(view)

        def observe(self, view):
            if moment == "observe":
                write(view.state)

    algorithm = Counts(
        0.75, seed=0, update={"freq": 1}, compute=compute, balance_in_groups=2, init_method="topk"
    )
    model, optimizer = prepare(algorithm)
    train(model, optimizer, 3)
    parameter = algorithm.parameters["0.weight"]
    assert set(parameter.dense_state()["age"][parameter.mask].tolist()) == {3.0}


def test_numbers_that_were_not_declared_are_refused():
    class Invents(ByView):
        def update_mask(self, view):
            view.state["age"] = view.weight.abs()
            return super().update_mask(view)

    algorithm = Invents(0.75, seed=0, update={"freq": 1})
    model, optimizer = prepare(algorithm)
    with pytest.raises(RarefyError, match=r"view\.state\['age'\].*connection_state = \{\"age\": 0\.0\}"):
        train(model, optimizer, 2)


def test_state_is_float32_beside_a_narrower_weight():
    algorithm = Averages(0.75, seed=0, compute="masked")
    prepare(algorithm, network().bfloat16())
    assert algorithm.parameters["0.weight"].state.entries["average"].dtype == torch.float32


def test_state_of_another_topology_is_refused():
    algorithm = Averages(0.75, seed=0, update={"freq": 1})
    model, optimizer = prepare(algorithm)
    train(model, optimizer, 1)
    saved = copy.deepcopy(algorithm.state_dict())
    train(model, optimizer, 1)
    with pytest.raises(
        RarefyError, match=r"state of 0\.weight belongs to another topology; load the model's"
    ):
        algorithm.load_state_dict(saved)


@both_storages
def test_another_model_that_is_loaded_starts_with_fresh_state_and_its_own_with_what_was_kept(compute):
    algorithm = Averages(0.75, seed=0, update={"freq": 2}, compute=compute)
    model, optimizer = prepare(algorithm)
    train(model, optimizer, 3)
    own = copy.deepcopy(model.state_dict())
    parameter = algorithm.parameters["0.weight"]
    kept = parameter.dense_state()["average"]
    model.load_state_dict(own)
    assert torch.equal(parameter.dense_state()["average"], kept)
    mask = torch.zeros(16, 12, dtype=torch.bool)
    mask[:4] = True
    model.load_state_dict({**own, "0.weight_mask": mask})
    assert set(parameter.dense_state()["average"].unique().tolist()) == {0.25}
    train(model, optimizer, 2, start=3)


def test_old_states_load_without_state_of_ones_own():
    algorithm = Averages(0.75, seed=0)
    model, optimizer = prepare(algorithm)
    train(model, optimizer, 2)
    state = {key: value for key, value in algorithm.state_dict().items() if key != "connections"}
    algorithm.load_state_dict(state)
    assert set(algorithm.parameters["0.weight"].state.entries["average"].unique().tolist()) == {0.25}


# ---- observe ----


class Watching(ByView):
    def observe(self, view):
        self.seen = getattr(self, "seen", [])
        self.seen.append((view.name, view.step, float(view.weight.sum()), float(view.gradient.abs().sum())))


@both_storages
def test_a_skipped_step_is_not_observed(compute):
    for fused in (False, True):
        algorithm = Watching(0.75, seed=0, update={"steps": [0]}, compute=compute)
        model, optimizer = prepare(algorithm, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(model, 0) * torch.inf).backward()
        scaler.step(optimizer)
        assert not hasattr(algorithm, "seen") and algorithm.step == 0


@both_storages
def test_each_weight_is_observed_by_the_step_that_changes_it(compute):
    model = network()
    algorithm = Watching(0.75, seed=0, update={"steps": [0]}, compute=compute)
    algorithm.apply(model)
    optimizers = [torch.optim.SGD(model[index].parameters(), lr=0.1) for index in (0, 2)]
    for optimizer in optimizers:
        algorithm.apply(optimizer)
    loss_of(model, 0).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [(name, step) for name, step, *_ in algorithm.seen] == [("0.weight", 1), ("2.weight", 1)]


@both_storages
@pytest.mark.parametrize("by_keyword", [False, True])
def test_a_closure_makes_the_gradient_that_is_observed(compute, by_keyword):
    seen = []
    for closes in (False, True):
        algorithm = Watching(0.75, seed=0, update={"steps": [0]}, compute=compute)
        model, optimizer = prepare(algorithm)

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(model, 0)
            loss.backward()
            return loss

        if not closes:
            closure()
            optimizer.step()
        else:
            loss = optimizer.step(closure=closure) if by_keyword else optimizer.step(closure)
            assert isinstance(loss, torch.Tensor)
        seen.append((algorithm.seen, model.state_dict()))
    assert seen[0][0] == seen[1][0]
    assert all(torch.equal(value, seen[1][1][key]) for key, value in seen[0][1].items())


# ---- forward masks ----


class HalfForward(ByView):
    """Forward passes use the larger half of what is active."""

    def forward_mask(self, view):
        return self.keep_top(view.weight.abs().masked_fill(~view.mask, -1), (1 + view.sparsity) / 2)


@both_storages
def test_a_forward_mask_that_contains_inactive_connections_is_refused(compute):
    class Everything(ByView):
        def forward_mask(self, view):
            return torch.ones_like(view.mask)

    with pytest.raises(
        RarefyError, match=r"Everything.forward_mask returned inactive connections; return a part"
    ):
        prepare(Everything(0.5, seed=0, compute=compute))


def test_forward_masks_wait_for_the_first_update_where_the_weight_begins_dense():
    class Half(ByView):
        def forward_mask(self, view):
            return self.keep_top(view.weight.abs(), 0.75)

    algorithm = Half(0.5, seed=0, update={"freq": 1, "start": 2})
    model, optimizer = prepare(algorithm)
    parameter = algorithm.parameters["0.weight"]
    for hides in (False, True):
        assert (parameter.forward.hidden is not None) == hides
        train(model, optimizer, 2)


def test_what_a_forward_mask_draws_does_not_depend_on_other_weights():
    class Drawn(ByView):
        def forward_mask(self, view):
            return view.mask & (torch.rand(view.mask.shape, generator=self.generator) < 0.5)

    both = Drawn(0.5, seed=0, compute="masked")
    prepare(both)
    name = list(both.parameters)[-1]
    alone = Drawn(0.5, seed=0, compute="masked", param_filter=name)
    prepare(alone)
    assert len(both.parameters) > 1
    assert torch.equal(both.parameters[name].forward.hidden, alone.parameters[name].forward.hidden)


@both_storages
def test_none_stands_for_the_whole_mask(compute):
    class Whole(ByView):
        def forward_mask(self, view):
            return None

    algorithm = Whole(0.5, seed=0, compute=compute)
    prepare(algorithm)
    assert algorithm.parameters["0.weight"].forward.hidden is None


@both_storages
def test_a_forward_mask_hides_values_between_steps_and_nowhere_else(compute):
    algorithm = HalfForward(0.5, seed=0, update={"freq": 3}, compute=compute, balance_out_groups=4)
    model, optimizer = prepare(algorithm, optimizer=torch.optim.AdamW)
    parameter = algorithm.parameters["0.weight"]
    seen = []
    optimizer.register_step_post_hook(lambda *_: seen.append(int((parameter.true_weight() != 0).sum())))
    for step in range(7):
        assert int((model[0].weight != 0).sum()) == 48 and int(parameter.mask.sum()) == 96
        assert int((model.state_dict()["0.weight"] != 0).sum()) in (48, 96)
        train(model, optimizer, 1, step)
    assert seen[:3] == [96, 96, 96]
    copied = copy.deepcopy(model)
    assert (
        torch.equal(copied[0].weight, model[0].weight)
        and copied.state_dict()["0.weight"].count_nonzero() == 48
    )
    rarefy.finalize(model)
    assert int((model[0].weight != 0).sum()) == 48 and type(model[0]) is nn.Linear


@both_storages
def test_a_closure_computes_with_the_forward_set(compute):
    ends = []
    for closes in (False, True):
        algorithm = HalfForward(0.5, seed=0, update={"freq": 2}, compute=compute)
        model, optimizer = prepare(algorithm, optimizer=torch.optim.AdamW)
        for step in range(4):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            if closes:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        ends.append(model.state_dict())
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


@both_storages
def test_a_value_that_was_written_between_steps_is_taken(compute):
    algorithm = HalfForward(0.5, seed=0, update={"steps": [0]}, compute=compute)
    model, optimizer = prepare(algorithm)
    parameter = algorithm.parameters["0.weight"]
    with torch.no_grad():
        parameter.weight.fill_(2.0)
    optimizer.step()
    assert set(parameter.true_weight()[parameter.mask].tolist()) == {2.0}
    assert int((model[0].weight[parameter.mask] != 0).sum()) == 48


@both_storages
def test_another_topology_that_is_loaded_is_used_whole(compute):
    algorithm = HalfForward(0.5, seed=0, update={"steps": [0]}, compute=compute)
    model, _ = prepare(algorithm)
    state = {**model.state_dict(), "0.weight": torch.ones(16, 12), "0.weight_mask": torch.ones(16, 12) > 0}
    model.load_state_dict(state)
    weight = algorithm.parameters["0.weight"].true_weight()
    assert set(weight.flatten().tolist()) == {1.0}


def test_the_view_of_four_tensors():
    view = WeightView.of(torch.ones(2), torch.tensor([True, False]), 0.5, torch.zeros(2))
    assert (view.name, view.step, view.sparsity) == ("", 0, 0.5) and view.gradient is not None
