"""Two processes average the active entries of sparse gradients alone, and learn what one process learns."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import rarefy
from ranks import in_processes
from rarefy.algorithms.attachment import averaging
from rarefy.cost import pays_off
from rarefy.errors import RarefyError
from rarefy.tensors import SparseWeight

RANKS, STEPS = 2, 7
ALGORITHMS = ("static", "gmp", "set", "rigl")
STORAGES = ("masked", "compact")
# (reentrant, storage); older versions lose the hooks of compact weights there, which is refused.
CHECKPOINTED = [(reentrant, compute) for reentrant in (False, True) for compute in STORAGES]
if torch.__version__ < (2, 10):
    CHECKPOINTED.remove((False, "compact"))


class Net(nn.Module):
    """Two layers, of which the second may be checkpointed, or left out by a process."""

    def __init__(self, seed: int = 0, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(16, 24, bias=bias, dtype=torch.float64)
        self.second = nn.Linear(24, 8, bias=bias, dtype=torch.float64)
        self.reentrant: bool | None = None
        self.uses_second = True

    def forward(self, x: Tensor) -> Any:
        hidden = self.first(x).relu()
        if not self.uses_second:
            return {"y": hidden}
        if self.reentrant is None:
            return {"y": self.second(hidden)}
        return {"y": checkpoint(self.second, hidden, use_reentrant=self.reentrant)}


def batch(step: int, piece: int = 0) -> Tensor:
    seed = 10 * step + piece
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sparsity_of(algorithm: str, compute: str = "compact", **options: Any) -> Any:
    update = {} if algorithm == "static" else {"update": {"freq": 3}}
    amount = {"type": "linear", "init": 0.2, "slope": 0.08} if algorithm == "gmp" else 0.75
    given = {"algorithm": algorithm, "sparsity": amount, "compute": compute, "seed": 1, **update, **options}
    return rarefy.configure(given)


def train(
    model: nn.Module, network: nn.Module, sparsity: Any, *, share: slice = slice(None), pieces: int = 1
) -> dict[str, Any]:
    """Masks, gradient norms and weights; `share` is what this process reads of every batch."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    masks, norms = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for piece in range(pieces):
            is_wrapped = isinstance(network, DistributedDataParallel)
            with network.no_sync() if is_wrapped and piece < pieces - 1 else nullcontext():
                (network(batch(step, piece)[share])["y"].square().mean() / pieces).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        masks.append({name: one.mask.clone() for name, one in sparsity.parameters.items()})
    weights = {name: dense(weight) for name, weight in model.named_parameters()}
    return {"masks": masks, "norms": norms, "weights": weights}


def dense(weight: Tensor) -> Tensor:
    return weight.dense() if isinstance(weight, SparseWeight) else weight.detach().clone()


def learn(rank: int | None, algorithm: str, compute: str, pieces: int = 1, **changes: Any) -> dict[str, Any]:
    """Trains one of two processes, or a single one."""
    model = Net()
    sparsity = sparsity_of(algorithm, compute)
    sparsity.apply(model)
    vars(model).update(changes)
    network = model if rank is None else DistributedDataParallel(model)
    share = slice(None) if rank is None else slice(rank, None, RANKS)
    return train(model, network, sparsity, share=share, pieces=pieces)


# ---- what each process does; every result is sent back ----


def other_first_weights(rank: int) -> dict[str, Any]:
    """Each process has weights of its own, and masks that follow from them, until the wrapper is called."""
    model = Net(seed=5 * rank)
    sparsity = sparsity_of("set", init_method="topk")
    sparsity.apply(model)
    return train(model, DistributedDataParallel(model), sparsity, share=slice(rank, None, RANKS))


def unused_by_one(rank: int, compute: str) -> list[Any]:
    """The second layer is used by the first process alone, then by none."""
    model = Net()
    sparsity_of("static", compute).apply(model)
    network = DistributedDataParallel(model, find_unused_parameters=True)
    found = []
    for is_used in (rank == 0, False):
        model.uses_second = is_used
        model.zero_grad()
        network(batch(0))["y"].sum().backward()
        gradient = model.second.weight.grad
        found.append(None if gradient is None else dense(gradient))
    return found


def wrapped_before(rank: int, compute: str) -> dict[str, Any]:
    model = Net()
    network = DistributedDataParallel(model)
    sparsity = sparsity_of("rigl", compute)
    sparsity.apply(model)
    return train(model, network, sparsity, share=slice(rank, None, RANKS))


def of_a_copy(rank: int) -> Tensor:
    """A copy has no algorithm, so its wrapper averages all."""
    model = Net()
    sparsity_of("static", "masked").apply(model)
    copied = copy.deepcopy(model)
    network = DistributedDataParallel(copied)
    network(batch(rank))["y"].sum().backward()
    assert copied.first.weight.grad is not None
    return copied.first.weight.grad


def without_bias(rank: int, compute: str) -> dict[str, Any]:
    """Nothing but sparse weights learns, so that the wrapper has to take them."""
    model = Net(bias=False)
    sparsity = sparsity_of("static", compute)
    sparsity.apply(model)
    return train(model, DistributedDataParallel(model), sparsity, share=slice(rank, None, RANKS))


def finalized(rank: int) -> tuple[str, bool, Tensor]:
    model = Net()
    sparsity_of("static").apply(model)
    network = DistributedDataParallel(model)
    network(batch(rank))["y"].sum().backward()
    rarefy.finalize(model)
    model.zero_grad()
    message = refusal(lambda: network(batch(rank)))
    has_trace = any("ignore" in name for name in vars(model))
    anew = DistributedDataParallel(model)
    anew(batch(rank))["y"].sum().backward()
    assert model.first.weight.grad is not None
    return message, has_trace, model.first.weight.grad


def past_the_wrapper(rank: int) -> None:
    model = Net()
    sparsity_of("static").apply(model)
    network = DistributedDataParallel(model)
    network.module(batch(rank))["y"].sum().backward()


def with_join(rank: int) -> None:
    model = Net()
    sparsity_of("static").apply(model)
    network = DistributedDataParallel(model)
    with network.join():
        network(batch(rank))


def after_a_failure(rank: int) -> Tensor:
    """A backward pass that failed asks for nothing in the next one."""
    model = Net()
    sparsity_of("static").apply(model)
    network = DistributedDataParallel(model, find_unused_parameters=True)

    def fail(_: Tensor) -> None:
        raise ValueError("on the way")

    out = network(batch(rank))["y"]
    handle = model.first.bias.register_hook(fail)
    with pytest.raises(ValueError, match="on the way"):
        out.sum().backward()
    handle.remove()
    model.zero_grad()
    del network
    again = DistributedDataParallel(model)
    again(batch(rank))["y"].sum().backward()
    return dense(model.second.weight.grad)  # type: ignore[arg-type]


def evaluated_by_one(rank: int) -> bool:
    """A forward pass without gradients exchanges nothing, so that one process may do it alone."""
    model = Net()
    sparsity_of("static").apply(model)
    network = DistributedDataParallel(model)
    if rank == 0:
        with torch.no_grad():
            network(batch(0))
    return True


def other_kernels(rank: int) -> None:
    model = Net()
    sparsity = sparsity_of("static")
    sparsity.apply(model)
    if rank:
        sparsity.parameters["first.weight"].become("masked", [])
    network = DistributedDataParallel(model)
    network(batch(rank))


def other_processor(rank: int) -> None:
    """Entries are in another order where panels have another width."""
    model = Net()
    sparsity_of("static").apply(model)
    network = DistributedDataParallel(model)
    with patch.object(averaging, "on_intel", lambda: rank == 0):
        network(batch(rank))


def chosen_by_auto(rank: int) -> list[Any]:
    """`auto` in float32, before the first step, after it, and in a run that goes on from there."""
    found = []
    state = None
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 4))
        sparsity = rarefy.configure({"sparsity": 0.98, "seed": 1, "param_filter": "0.weight"})
        sparsity.apply(model)
        optimizer = torch.optim.AdamW(model.parameters())
        sparsity.apply(optimizer)
        network = DistributedDataParallel(model)
        if state is not None:
            sparsity.load_state_dict(state)
        found.append(sparsity.parameters["0.weight"].storage.kind)
        # A batch of one token pays for nothing: the second process alone would choose another storage.
        network(torch.ones(4096 if rank == 0 else 1, 512)).square().mean().backward()
        optimizer.step()
        found.append(sparsity.parameters["0.weight"].storage.kind)
        state = sparsity.state_dict()
    return found


def compiled(rank: int, is_wrapped_first: bool) -> dict[str, Any]:
    model = Net()
    sparsity = sparsity_of("set")
    sparsity.apply(model)
    if is_wrapped_first:
        wrapper = DistributedDataParallel(model)
        network: Any = torch.compile(wrapper, backend="eager")
    else:
        network = DistributedDataParallel(torch.compile(model, backend="eager"))
    return train(model, network, sparsity, share=slice(rank, None, RANKS))


def refusal(act: Callable[[], Any]) -> str:
    try:
        act()
    except RarefyError as error:
        return str(error)
    return ""


def work(rank: int) -> dict[str, Any]:
    runs: dict[Any, Any] = {}
    for compute in STORAGES:
        for algorithm in ALGORITHMS:
            runs[algorithm, compute] = learn(rank, algorithm, compute)
        runs["accumulated", compute] = learn(rank, "rigl", compute, pieces=2)
        runs["unused", compute] = unused_by_one(rank, compute)
        runs["without bias", compute] = refusal(lambda: without_bias(rank, compute))  # noqa: B023
    for reentrant, compute in CHECKPOINTED:
        runs[reentrant, compute] = learn(rank, "rigl", compute, reentrant=reentrant)
    runs["weights"] = other_first_weights(rank)
    runs["wrapped before", "masked"] = wrapped_before(rank, "masked")
    runs["wrapped before", "compact"] = refusal(lambda: wrapped_before(rank, "compact"))
    runs["without bias"] = without_bias(rank, "masked")
    runs["copy"] = of_a_copy(rank)
    runs["finalized"] = finalized(rank)
    runs["past"] = refusal(lambda: past_the_wrapper(rank))
    runs["join"] = refusal(lambda: with_join(rank))
    runs["failed"] = after_a_failure(rank)
    runs["evaluated"] = evaluated_by_one(rank)
    runs["kernels"] = refusal(lambda: other_kernels(rank))
    runs["processor"] = refusal(lambda: other_processor(rank))
    runs["auto"] = chosen_by_auto(rank)
    runs["compiled first"] = compiled(rank, is_wrapped_first=False)
    runs["wrapped first"] = compiled(rank, is_wrapped_first=True)
    dist.barrier()
    return runs


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What both processes found; one start of processes serves all tests."""
    return in_processes(RANKS, work, tmp_path_factory.mktemp("ranks"))


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for step, (masks, wanted) in enumerate(zip(found["masks"], expected["masks"], strict=True)):
        assert all(torch.equal(masks[name], wanted[name]) for name in wanted), step
    torch.testing.assert_close(found["norms"], expected["norms"])
    torch.testing.assert_close(found["weights"], expected["weights"])


@pytest.mark.parametrize("compute", STORAGES)
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_two_processes_learn_what_one_learns(results: Any, algorithm: str, compute: str) -> None:
    alone = learn(None, algorithm, compute)
    for result in results:
        assert_same(result[algorithm, compute], alone)


@pytest.mark.parametrize("compute", STORAGES)
def test_micro_batches_are_exchanged_once(results: Any, compute: str) -> None:
    alone = learn(None, "rigl", compute, pieces=2)
    for result in results:
        assert_same(result["accumulated", compute], alone)


@pytest.mark.parametrize(("reentrant", "compute"), CHECKPOINTED)
def test_checkpointed_layers_are_averaged(results: Any, reentrant: bool, compute: str) -> None:
    alone = learn(None, "rigl", compute)
    for result in results:
        assert_same(result[reentrant, compute], alone)


def test_weights_and_masks_are_those_of_the_first_process(results: Any) -> None:
    model = Net()
    sparsity = sparsity_of("set", init_method="topk")
    sparsity.apply(model)
    alone = train(model, model, sparsity)
    for result in results:
        assert_same(result["weights"], alone)


@pytest.mark.parametrize("compute", STORAGES)
def test_a_weight_that_one_process_does_not_use_has_half_the_gradient(results: Any, compute: str) -> None:
    model = Net()
    sparsity_of("static", compute).apply(model)
    model(batch(0))["y"].sum().backward()
    assert model.second.weight.grad is not None
    for result in results:
        by_one, by_none = result["unused", compute]
        torch.testing.assert_close(by_one, dense(model.second.weight.grad) / 2)
        assert by_none is None


def test_a_model_that_was_wrapped_before_is_masked(results: Any) -> None:
    alone = learn(None, "rigl", "masked")
    for result in results:
        assert_same(result["wrapped before", "masked"], alone)
        assert (
            "first.weight is in compact storage, and DistributedDataParallel averages it as a dense weight"
            in (result["wrapped before", "compact"])
        )


def test_where_nothing_else_learns_the_wrapper_averages(results: Any) -> None:
    model = Net(bias=False)
    sparsity = sparsity_of("static", "masked")
    sparsity.apply(model)
    alone = train(model, model, sparsity)
    for result in results:
        assert_same(result["without bias"], alone)
        assert result["without bias", "masked"] == ""
        assert "nothing else of it learns" in result["without bias", "compact"]


def test_the_wrapper_of_a_copy_averages_all(results: Any) -> None:
    model = Net()
    sparsity_of("static", "masked").apply(model)
    copied = copy.deepcopy(model)
    sum(copied(batch(rank))["y"].sum() for rank in range(RANKS)).backward()  # type: ignore[union-attr]
    assert copied.first.weight.grad is not None
    for result in results:
        torch.testing.assert_close(result["copy"], copied.first.weight.grad / RANKS)


def test_a_wrapper_that_outlives_sparsity_is_refused(results: Any) -> None:
    first, second = (result["finalized"] for result in results)
    assert "was sparse when DistributedDataParallel was built" in first[0] and first[0] == second[0]
    assert not first[1]
    assert torch.equal(first[2], second[2]) and first[2].count_nonzero() > first[2].numel() / 2


def test_a_forward_pass_that_the_wrapper_does_not_see_is_refused(results: Any) -> None:
    assert all("call the wrapped model, not its .module" in result["past"] for result in results)


def test_uneven_inputs_are_refused(results: Any) -> None:
    assert all("ddp.join() is not allowed with sparse weights" in result["join"] for result in results)


def test_a_backward_pass_that_failed_leaves_nothing_behind(results: Any) -> None:
    first, second = (result["failed"] for result in results)
    assert torch.equal(first, second) and first.any()


def test_one_process_may_evaluate_alone(results: Any) -> None:
    assert all(result["evaluated"] for result in results)


@pytest.mark.parametrize("case", ["kernels", "processor"])
def test_processes_with_other_storage_are_refused(results: Any, case: str) -> None:
    assert all("store sparse weights in different ways" in result[case] for result in results)


@pytest.mark.parametrize("order", ["compiled first", "wrapped first"])
def test_compiled_models_are_averaged(results: Any, order: str) -> None:
    alone = learn(None, "set", "compact")
    for result in results:
        assert_same(result[order], alone)


def test_auto_is_what_the_first_process_chooses(results: Any) -> None:
    before, after, *_ = results[0]["auto"]
    assert results[0]["auto"] == results[1]["auto"]
    assert before == "masked"
    assert after == ("compact" if pays_off(512, 512, 4096, 0.02, torch.float32) else "masked")
    # Taken up again where the run goes on.
    assert results[0]["auto"][2] == results[0]["auto"][1]
