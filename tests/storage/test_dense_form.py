"""What an update shows of a weight in dense form: built once, and never other than the weight."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.updating import DenseForm
from rarefy.tensors.topology import Topology

both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


class Larger(rarefy.DynamicSparsityAlgorithm):
    """Exchanges connections; forward passes use the larger half of them."""

    weights: list[Tensor]

    def update_mask(self, view: Any) -> Tensor:
        return self.keep_top(torch.rand(view.weight.shape, generator=view.generator), view.sparsity)

    def forward_mask(self, view: Any) -> Tensor:
        self.weights = [*getattr(self, "weights", []), view.weight.clone()]
        return self.keep_top(view.weight.abs().masked_fill(~view.mask, -1), (1 + view.sparsity) / 2)


def applied(algorithm: Any, compute: str = "compact") -> tuple[Any, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    algorithm = algorithm(0.5, seed=0, compute=compute, update={"freq": 1})
    algorithm.apply(layer)
    return algorithm, layer


def the_weight_of(algorithm: Any) -> SparseParameter:
    return next(iter(algorithm.parameters.values()))


@both_storages
def test_forward_masks_are_chosen_by_the_weight_as_the_update_left_it(compute: str) -> None:
    algorithm, _ = applied(Larger, compute)
    for _ in range(5):
        algorithm.update()
        true = the_weight_of(algorithm).true_weight()
        assert torch.equal(algorithm.weights[-1], true)
        assert len(set(true.count_nonzero(1).tolist())) > 1


def test_compact_storage_spreads_weight_and_mask_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, _ = applied(Larger)
    calls = []
    for name in ("mask", "dense"):
        original = getattr(Topology, name)

        def counted(*given: Any, original: Any = original, name: str = name) -> Tensor:
            calls.append(name)
            return original(*given)

        monkeypatch.setattr(Topology, name, counted)
    algorithm.update()
    assert sorted(calls) == ["dense", "mask"]


@both_storages
def test_what_a_hook_writes_to_the_weight_counts_for_the_forward_mask(compute: str) -> None:
    algorithm, layer = applied(Larger, compute)

    def begin_at_three(algorithm: Any, name: str, before: Tensor, after: Tensor) -> None:
        with torch.no_grad():
            layer.weight.copy_(torch.where(after & ~before, 3.0, layer.weight.to_dense()))

    algorithm.register_topology_hook(begin_at_three)
    algorithm.update()
    assert torch.equal(algorithm.weights[-1], the_weight_of(algorithm).true_weight())
    assert int((algorithm.weights[-1] == 3.0).sum()) > 50


def test_what_an_algorithm_writes_to_the_copy_it_was_shown_does_not_count() -> None:
    class Careless(Larger):
        def update_mask(self, view: Any) -> Tensor:
            view.weight.fill_(7.0)
            return super().update_mask(view)

    algorithm, _ = applied(Careless)
    algorithm.update()
    assert torch.equal(algorithm.weights[-1], the_weight_of(algorithm).true_weight())
    assert not bool((algorithm.weights[-1] == 7.0).any())


def test_the_dense_weight_is_free_again_before_the_mask_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a method without forward masks: what moves connections needs memory of its own."""
    seen: list[weakref.ref[Tensor]] = []

    class Plain(rarefy.DynamicSparsityAlgorithm):
        def update_mask(self, view: Any) -> Tensor:
            seen.append(weakref.ref(view.weight))
            return view.mask.flip(1)

    algorithm, _ = applied(Plain)
    original = SparseParameter.set_mask
    held = []

    def watched(parameter: SparseParameter, *given: Any) -> None:
        held.append(seen[-1]() is not None)
        original(parameter, *given)

    monkeypatch.setattr(SparseParameter, "set_mask", watched)
    algorithm.update()
    assert held == [False]


def test_a_form_that_was_forgotten_is_built_anew() -> None:
    algorithm, _ = applied(Larger)
    parameter = the_weight_of(algorithm)
    parameter.show()
    form = DenseForm(parameter)
    first = form.weight, form.mask
    assert form.weight is first[0] and form.mask is first[1]
    form.forget()
    assert form.weight is not first[0] and form.mask is not first[1]
    assert torch.equal(form.weight, first[0]) and torch.equal(form.mask, first[1])
