"""What algorithms, schedules and optimizers of users' own return and write: taken as meant, or refused by name."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.algorithms.drop_and_grow import DropAndGrow
from rarefy.errors import RarefyError

both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


def train(algorithm: Any, steps: int = 2, optimizer: Any = None) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(8, 16).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1) if optimizer is None else optimizer(layer)
    algorithm.apply(layer)
    algorithm.apply(optimizer)
    for _ in range(steps):
        optimizer.zero_grad()
        layer(torch.randn(4, 8, dtype=torch.float64)).square().mean().backward()
        optimizer.step()
    return layer


# ---- what is shown is not to be changed ----


class Answers(rarefy.DynamicSparsityAlgorithm):
    """A mask by a function of the view."""

    needs = "dense"
    competes = True

    def __init__(self, answer: Any, **options: Any) -> None:
        super().__init__(0.5, **options)
        self.answer = answer

    def update_mask(self, view: Any) -> Tensor:
        return self.answer(view)

    def score(self, view: Any) -> Tensor:
        return self.answer(view)


def flipped(view: Any) -> Tensor:
    return view.mask.logical_not_()


def doubled(view: Any) -> Tensor:
    view.weight.mul_(2)
    return view.mask


def forgotten(view: Any) -> Tensor:
    assert view.gradient is not None
    view.gradient.zero_()
    return view.mask


@both_storages
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize(
    ("answer", "what"), [(flipped, "mask"), (doubled, "weight"), (forgotten, "gradient")]
)
def test_a_view_that_is_written_to_is_refused_by_name(
    answer: Any, what: str, groups: int | None, compute: str
) -> None:
    """In masked storage the model itself was changed, and in compact storage nothing."""
    with pytest.raises(
        RarefyError, match=f"^Answers.update_mask changed the {what} of weight in place; work on a"
    ):
        train(Answers(answer, compute=compute, balance_out_groups=groups))


@both_storages
def test_scores_that_compete_are_not_made_in_place(compute: str) -> None:
    algorithm = Answers(lambda view: view.weight.abs_(), distribution="global", compute=compute)
    with pytest.raises(RarefyError, match=r"Answers.score changed the weight of weight in place"):
        train(algorithm)


class Grows(DropAndGrow):
    """Grows, and if asked drops, by a function of the weight."""

    def __init__(self, score: Any, method: str, **options: Any) -> None:
        super().__init__(0.5, **options)
        self.by = {method: score}

    def grow_score(self, weight: Tensor, dense_grad: Any) -> Tensor:
        return self.by.get("grow_score", torch.abs)(weight)

    def drop_score(self, weight: Tensor, dense_grad: Any) -> Tensor:
        return self.by.get("drop_score", torch.abs)(weight)


# ---- one score for each connection ----

SCORES = {
    "transposed": (lambda weight: weight.t().abs(), r"torch.float64 \[8, 16\]"),
    "a row": (lambda weight: weight.abs().sum(0, keepdim=True), r"torch.float64 \[1, 8\]"),
    "truths": (lambda weight: weight != 0, r"torch.bool \[16, 8\]"),
    "complex numbers": (lambda weight: weight + 0j, r"torch.complex128 \[16, 8\]"),
    "nothing": (lambda weight: None, "NoneType"),
}


@both_storages
@pytest.mark.parametrize("method", ["drop_score", "grow_score"])
@pytest.mark.parametrize("kind", SCORES)
def test_scores_of_another_form_are_refused_by_name(kind: str, method: str, compute: str) -> None:
    """As many scores in another shape were taken one after the other, each for another connection's."""
    score, got = SCORES[kind]
    with pytest.raises(
        RarefyError, match=rf"^Grows.{method} returned {got}; return a tensor of real numbers of"
    ):
        train(Grows(score, method, compute=compute))


@both_storages
@pytest.mark.parametrize("accumulates", [False, True])
def test_a_gradient_score_is_one_number_for_each_entry(accumulates: bool, compute: str) -> None:
    class BySum(DropAndGrow):
        needs = "dense"

        def gradient_score(self, gradient: Tensor) -> Tensor:
            return gradient.abs().sum()

    algorithm = BySum(0.5, compute=compute)
    algorithm.accumulates = accumulates
    with pytest.raises(
        RarefyError, match=r"^BySum.gradient_score returned torch.float64 \[\]; return a tensor"
    ):
        train(algorithm)


def test_competing_scores_are_one_for_each_connection() -> None:
    algorithm = Answers(lambda view: view.weight.abs().sum(0), distribution="global")
    with pytest.raises(RarefyError, match=r"^Answers.score returned torch.float64 \[8\]; return"):
        train(algorithm)


@pytest.mark.parametrize("choose", [rarefy.masks.drop_lowest, rarefy.masks.grow_highest])
def test_scores_of_another_shape_than_the_mask_are_refused(choose: Any) -> None:
    with pytest.raises(
        RarefyError, match=r"scores of shape \[3, 2\] for a mask of shape \[2, 3\] are not allowed"
    ):
        choose(torch.tensor([[True, False, True], [False, True, False]]), torch.rand(3, 2), 1)


# ---- schedules ----


def test_a_drop_fraction_in_per_cent_is_said_once() -> None:
    """The length of a run in a loop of one's own is not known before; 30 was 1 without a word."""
    said = r"^set: a schedule gives 30 \(did you mean 0.3\?\) at step 1, outside \[0, 1\]; it is clamped$"
    with pytest.warns(UserWarning, match=said) as caught:
        train(rarefy.SET(0.5, drop_fraction=lambda step: 30), steps=4)
    assert len([one for one in caught if "clamped" in str(one.message)]) == 1


def test_a_sparsity_below_zero_is_said() -> None:
    schedule = rarefy.schedules.Linear(init=0.25, slope=-0.25)
    with pytest.warns(UserWarning, match=r"^set: a schedule gives -0.25 at step 2, outside \[0, 1\]"):
        layer = train(rarefy.SET(schedule), steps=2)
    assert layer.weight_mask.all()  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


def test_what_was_said_before_the_run_is_not_said_again() -> None:
    block = {"algorithm": "set", "sparsity": 0.5, "drop_fraction": lambda step: 30}
    with pytest.warns(UserWarning, match="outside"):
        algorithm = rarefy.configure(block, num_steps=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(algorithm)


def test_a_formula_that_ends_at_a_bound_is_within() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer = train(rarefy.SET(0.5, drop_fraction=lambda step: -1e-17))
    assert layer.weight_mask.float().mean() == 0.5  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]


@pytest.mark.parametrize("answer", [None, "much", 1j, [0.5]])
def test_a_schedule_function_that_returns_no_number_is_refused(answer: Any) -> None:
    with pytest.raises(RarefyError, match=r"^the schedule function returned .* at step 1; return a number$"):
        train(rarefy.SET(0.5, drop_fraction=lambda step: answer))


@pytest.mark.parametrize("answer", [None, "no"])
def test_an_update_function_that_returns_nothing_or_a_text_is_refused(answer: Any) -> None:
    """Without a `return` the model stayed dense to the end, and "no" was yes."""
    with pytest.raises(
        RarefyError, match=r"^the update function returned .* at step 0; return True or False$"
    ):
        train(rarefy.SET(0.5, update=lambda step: answer))


# ---- optimizers that have no learning rate ----


class OwnRate(torch.optim.Optimizer):
    """Works its rate out by itself, as Adafactor of transformers does."""

    def __init__(self, layer: nn.Module, given: dict[str, Any]) -> None:
        super().__init__(layer.parameters(), given)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for one in self.param_groups[0]["params"]:
            one.add_(one.grad, alpha=-0.1)


@both_storages
@pytest.mark.parametrize("given", [{}, {"lr": None}])
def test_weights_of_an_optimizer_without_a_rate_are_not_frozen(given: dict[str, Any], compute: str) -> None:
    algorithm = rarefy.SET(0.5, compute=compute, seed=0)
    before = rarefy.SET(0.5, seed=0)
    layer = train(algorithm, steps=3, optimizer=lambda one: OwnRate(one, given))
    assert algorithm.updates == 4
    assert not torch.equal(layer.weight_mask, train(before, steps=0).weight_mask)  # pyright: ignore
