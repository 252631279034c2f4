"""What `forward_mask` is shown after an update: weight and mask as they are, whoever wrote to them meanwhile."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rarefy
from rarefy.errors import RarefyError
from rarefy.storage.parameter import SparseParameter
from rarefy.tensors.topology import Topology

both_storages = pytest.mark.parametrize("compute", ["masked", "compact"])


class Larger(rarefy.DynamicSparsityAlgorithm):
    """Exchanges connections; forward passes use the larger half of them."""

    interferes: Callable[[Any], object] | None = None

    def update_mask(self, view: Any) -> Tensor:
        mask = self.keep_top(torch.rand(view.weight.shape, generator=view.generator), view.sparsity)
        if self.interferes is not None:
            self.interferes(view)
        return mask

    def forward_mask(self, view: Any) -> Tensor:
        self.shown = view.weight.clone(), view.mask.clone()
        return self.keep_top(view.weight.abs().masked_fill(~view.mask, -1), (1 + view.sparsity) / 2)


def applied(algorithm: Any, compute: str = "compact") -> tuple[Any, nn.Linear]:
    torch.manual_seed(0)
    layer = nn.Linear(32, 16)
    algorithm = algorithm(0.5, seed=0, compute=compute, update={"freq": 1})
    algorithm.apply(layer)
    return algorithm, layer


def the_weight_of(algorithm: Any) -> SparseParameter:
    return next(iter(algorithm.parameters.values()))


def check_what_was_shown(algorithm: Any) -> None:
    parameter = the_weight_of(algorithm)
    weight, mask = algorithm.shown
    assert torch.equal(weight, parameter.true_weight()) and torch.equal(mask, parameter.mask)


@both_storages
def test_forward_masks_are_chosen_by_the_weight_as_the_update_left_it(compute: str) -> None:
    algorithm, _ = applied(Larger, compute)
    for _ in range(5):
        algorithm.update()
        check_what_was_shown(algorithm)
        assert len(set(algorithm.shown[0].count_nonzero(1).tolist())) > 1


def test_compact_storage_builds_its_mask_once_an_update(monkeypatch: pytest.MonkeyPatch) -> None:
    algorithm, _ = applied(Larger)
    calls = []
    original = Topology.mask

    def counted(topology: Topology) -> Tensor:
        calls.append(topology)
        return original(topology)

    monkeypatch.setattr(Topology, "mask", counted)
    algorithm.update()
    assert len(calls) == 1


def load_fours(layer: nn.Linear) -> None:
    layer.load_state_dict({name: torch.full_like(own, 4) for name, own in layer.state_dict().items()})


@both_storages
@pytest.mark.parametrize(
    "write",
    [
        lambda layer: layer.weight.detach().fill_(4.0),
        lambda layer: layer.weight.data.fill_(4.0),
        lambda layer: setattr(layer.weight, "data", torch.full_like(layer.weight.to_dense(), 4.0)),
        load_fours,
    ],
)
def test_what_an_algorithm_writes_to_the_weight_in_an_update_counts(
    compute: str, write: Callable[[nn.Linear], object]
) -> None:
    algorithm, layer = applied(Larger, compute)
    algorithm.interferes = lambda view: write(layer)
    algorithm.update()
    check_what_was_shown(algorithm)
    assert int((algorithm.shown[0] == 4.0).sum()) > 50


def test_what_is_written_past_autograd_to_the_copy_that_compact_storage_shows_does_not_count() -> None:
    algorithm, _ = applied(Larger)
    algorithm.interferes = lambda view: view.weight.data.fill_(7.0)
    algorithm.update()
    check_what_was_shown(algorithm)
    assert not bool((algorithm.shown[0] == 7.0).any())


@both_storages
def test_what_a_hook_writes_to_the_weight_counts_for_the_forward_mask(compute: str) -> None:
    algorithm, layer = applied(Larger, compute)

    def begin_at_three(algorithm: Any, name: str, before: Tensor, after: Tensor) -> None:
        with torch.no_grad():
            layer.weight.copy_(torch.where(after & ~before, 3.0, layer.weight.to_dense()))

    algorithm.register_topology_hook(begin_at_three)
    algorithm.update()
    check_what_was_shown(algorithm)
    assert int((algorithm.shown[0] == 3.0).sum()) > 50


@both_storages
@pytest.mark.parametrize("kind", ["topology", "computed_sparsity"])
def test_a_mask_that_a_hook_loads_counts_for_the_forward_mask(compute: str, kind: str) -> None:
    algorithm, layer = applied(Larger, compute)
    first = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    getattr(algorithm, f"register_{kind}_hook")(lambda *_: layer.load_state_dict(first) and None)
    algorithm.update()
    check_what_was_shown(algorithm)
    assert torch.equal(algorithm.shown[1], first["weight_mask"])


def test_a_forward_mask_that_was_written_over_the_shown_one_is_refused() -> None:
    class Overwrites(Larger):
        def forward_mask(self, view: Any) -> Tensor:
            return view.mask.fill_(True)

    with pytest.raises(RarefyError, match=r"Overwrites.forward_mask changed the mask of weight in place"):
        applied(Overwrites)


def test_the_dense_weight_is_free_again_before_the_mask_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """What moves connections needs memory of its own."""
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
