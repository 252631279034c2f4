"""Two processes that train together agree on every mask and rank by the mean dense gradient."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import rarefy
from ranks import start_copies
from rarefy.callbacks import Callback
from rarefy.distributed import (
    Parallel,
    ParallelConfig,
    Traffic,
    agreed_seed,
    lost_another,
    mean_over_ranks,
    means,
    means_over_ranks,
    of_first,
    ranks,
)
from rarefy.errors import ConfigError, RarefyError
from rarefy.validation.block import read_block

RANKS, STEPS = 2, 4
SCENARIOS = {"set": ("set", 1), "rigl 1": ("rigl", 1), "rigl 2": ("rigl", 2)}


def inputs(rank, step):
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def train(sparsity, model, network, rank, micro_batches):
    """The masks after every step, and the dense gradients that every update saw."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sparsity.apply(optimizer)
    masks, seen = [], []
    update_mask = sparsity.update_mask

    def recording(weight, mask, target, dense_grad):
        seen.append(None if dense_grad is None else dense_grad.clone())
        return update_mask(weight, mask, target, dense_grad)

    sparsity.update_mask = recording
    for step in range(STEPS):
        optimizer.zero_grad()
        for piece in range(micro_batches):
            network(inputs(rank, 10 * step + piece)).square().mean().backward()
        optimizer.step()
        masks.append(model.weight_mask.clone())
    return masks, seen


def new_model():
    model = nn.Linear(8, 8)
    with torch.no_grad():
        model.weight.copy_(torch.arange(64.0).view(8, 8).sin())
    return model


def train_sparse(rank, algorithm, micro_batches):
    torch.manual_seed(1000 + rank)
    model = new_model()
    sparsity = rarefy.configure({"algorithm": algorithm, "sparsity": 0.75, "drop_fraction": 0.5})
    sparsity.apply(model)
    first = model.weight_mask.clone()
    masks, seen = train(sparsity, model, DistributedDataParallel(model), rank, micro_batches)
    return {"masks": [first, *masks], "seen": seen, "weight": model.weight.detach()}


def diverged(rank):
    """What the ranks are told whose weights are their own."""
    torch.manual_seed(rank)
    model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(4)), nn.Linear(8, 8))
    model[4].requires_grad_(False)
    sparsity = rarefy.SET(0.5, drop_fraction=0.5)
    sparsity.apply(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsity.apply(optimizer)
    model(torch.ones(1, 8)).sum().backward()
    try:
        optimizer.step()
    except RarefyError as error:
        return str(error)


def storage():
    """What `auto` chooses where it would be compact in a single process, before a wrapper leaves the weight to it."""
    model = nn.Linear(256, 384)
    sparsity = rarefy.configure({"sparsity": 0.95})
    sparsity.apply(model)
    sparsity.apply(torch.optim.AdamW(model.parameters()))
    return rarefy.summary(sparsity).rows[0].storage


def averaged(rank):
    """The means of tensors of two kinds, in exchanges of 64 bytes; the last one is brought by the second rank alone."""
    entries = [torch.full((6,), rank + 1.0), torch.full((2,), float(rank), dtype=torch.float64)]
    entries += [torch.arange(40.0), torch.zeros(0), torch.full((1,), 4.0 * rank), torch.zeros(3)]
    traffic = Traffic()
    found = means_over_ranks(entries, [True, True, True, True, rank == 1, False], None, traffic)
    return entries, found, traffic.bytes


class Square(nn.Module):
    """One sparse weight of 64 entries, and 8 others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(8, 8)

    def forward(self, x):
        return self.layer(x).square().mean()


class Counting(Callback):
    """After each step, the bytes that torch was given so far and those that the trainer says of gradients."""

    def __init__(self, given):
        self.given = given
        self.seen = []

    def on_train_batch_end(self, trainer, metrics):
        self.seen.append((sum(self.given), trainer.session.traffic().bytes, metrics["communication/bytes"]))


def traffic_of_a_run(rank, folder):
    """What a run with an update after its second step gave into exchanges."""
    given = []
    exchange, gather = dist.all_reduce, dist.all_gather

    def counted(tensor, *args, **options):
        given.append(tensor.numel() * tensor.element_size())
        return exchange(tensor, *args, **options)

    def counted_marks(found, tensor):
        given.append(tensor.numel() * tensor.element_size())
        return gather(found, tensor)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "all_reduce", counted)
        patch.setattr(dist, "all_gather", counted_marks)
        counting = Counting(given)
        trainer = rarefy.Trainer(
            model_dir=f"{folder}/run",
            model=Square,
            device="cpu",
            optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
            sparsity={"algorithm": "rigl", "sparsity": 0.75, "update": {"freq": 2}},
            parallel={"strategy": "ddp"},
            loop={"num_steps": 3},
            logging={"log_steps": 1},
            callbacks=[counting],
            loggers=[],
            seed=1,
        )
        trainer.fit([inputs(rank, step) for step in range(3)])
    return counting.seen, trainer.session.traffic().seconds


def work(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    results: dict[str, object] = {key: train_sparse(rank, *scenario) for key, scenario in SCENARIOS.items()}
    results["traffic"] = traffic_of_a_run(rank, folder)
    results["diverged"] = diverged(rank)
    results["mean"] = mean_over_ranks(torch.tensor([float(rank)]))
    results["storage"] = storage()
    means.BUCKET = 64
    results["averaged"] = averaged(rank)
    results["of first"] = of_first([rank, 5 - rank], torch.device("cpu"))
    results["ranks and seed"] = (ranks(), agreed_seed(7 + rank))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What both ranks found; one start of processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    start_copies(work, RANKS, f"file://{folder}/rendezvous", str(folder))
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def assert_agreement(first, second):
    assert all(torch.equal(*pair) for pair in zip(first["masks"], second["masks"], strict=True))
    assert any(not torch.equal(first["masks"][0], mask) for mask in first["masks"])
    assert torch.equal(first["weight"], second["weight"])
    for result in (first, second):
        assert not result["weight"][~result["masks"][-1]].any()
        assert all(int(mask.sum()) == 16 for mask in result["masks"])


def test_set_draws_the_same_masks_on_every_rank(results):
    assert_agreement(*(result["set"] for result in results))


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_rigl_ranks_by_the_mean_dense_gradient(results, micro_batches):
    first, second = (result[f"rigl {micro_batches}"] for result in results)
    assert_agreement(first, second)
    assert len(first["seen"]) == STEPS
    assert all(torch.equal(*pair) for pair in zip(first["seen"], second["seen"], strict=True))
    expected = dense_gradient_of_the_first_step(first["masks"][0], micro_batches)
    torch.testing.assert_close(first["seen"][0], expected)


def test_processes_whose_masks_differ_are_told_so_at_the_update(results):
    message = (
        "the processes have different masks of 0.weight, 1.weight, 2.weight and 1 more at the update of step 1, "
        "because their weights or gradients differ; wrap the model in DistributedDataParallel, give every process the "
        "same seed and initial weights, or destroy the process group if they train different models"
    )
    assert [result["diverged"] for result in results] == [message, message]


def test_means_and_seeds_are_shared(results):
    assert [result["mean"].item() for result in results] == [0.5, 0.5]
    assert [result["ranks and seed"] for result in results] == [(2, 7), (2, 7)]


def test_many_tensors_are_averaged_in_few_exchanges(results):
    for result in results:
        entries, found, size = result["averaged"]
        assert [one.tolist() for one in entries[:2]] == [[1.5] * 6, [0.5] * 2]
        assert entries[2].tolist() == list(range(40))
        assert [one.tolist() for one in entries[3:]] == [[], [2.0], [0.0] * 3]
        assert found == [True, True, True, True, True, False]
        # One number more for each tensor, which says whether somebody brought it.
        assert size == 4 * (6 + 40 + 0 + 1 + 3 + 5) + 8 * (2 + 1)


def test_a_run_counts_the_bytes_of_all_gradients(results):
    for result in results:
        seen, seconds = result["traffic"]
        # 16 active entries, a number that says whether they are there, 8 of the bias; of the 53 that do not stay in an
        # update each is marked twice, and those that somebody has marked are summed.
        ordinary, marks = 4 * (16 + 1 + 8), 2 * 7
        update = seen[1][1] - 2 * ordinary
        assert marks < update <= marks + 4 * 53 and (update - marks) % 4 == 0
        assert [own for _, own, _ in seen] == [ordinary, 2 * ordinary + update, 3 * ordinary + update]
        assert [logged for _, _, logged in seen] == [ordinary, ordinary + update, ordinary]
        assert seconds > 0
        others = [given - own for given, own, _ in seen]
        # Losses and checks.
        assert all(0 < after - before < 200 for before, after in zip([0, *others], others, strict=False))


def test_waits_that_overlap_count_once(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    traffic = Traffic()
    # Of two that began at 1 and 2, one ends at 4 and one at 6; a third is apart from them.
    for start, end in ((1.0, 4.0), (2.0, 6.0), (8.0, 9.0)):
        now[0] = end
        traffic.waited(start)
    assert traffic.seconds == 3 + 2 + 1


def test_the_first_process_says_the_numbers(results):
    assert [result["of first"] for result in results] == [[0, 5]] * RANKS


def dense_gradient_of_the_first_step(mask, micro_batches):
    torch.manual_seed(1000)
    model = new_model()
    with torch.no_grad():
        model.weight.mul_(mask)
    for rank in range(RANKS):
        for piece in range(micro_batches):
            (model(inputs(rank, piece)).square().mean() / RANKS).backward()
    assert model.weight.grad is not None
    return model.weight.grad


@pytest.mark.parametrize("strategy", ["auto", "ddp"])
def test_alone_a_model_is_not_wrapped(strategy):
    model = nn.Linear(2, 2)
    parallel = Parallel(ParallelConfig(strategy=strategy))
    assert parallel.wrapped(model) is model
    with parallel.accumulating(model, is_last=False):
        pass


def test_an_unknown_strategy_is_refused():
    with pytest.raises(
        ConfigError, match=r"parallel.strategy: 'dpp' is not allowed; give auto, ddp or fsdp2"
    ):
        read_block(ParallelConfig, {"strategy": "dpp"}, "parallel")


@pytest.mark.parametrize(
    ("error", "is_that"),
    [
        (RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:53648."), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (ValueError("Connection closed by peer"), False),
    ],
)
def test_an_error_that_tells_of_another_process(monkeypatch, error, is_that):
    assert not lost_another(error)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert lost_another(error) == is_that


def test_alone_nothing_is_exchanged():
    tensor = torch.ones(2)
    assert (ranks(), agreed_seed(3)) == (1, 3)
    assert mean_over_ranks(tensor) is tensor and tensor.tolist() == [1.0, 1.0]


def test_auto_is_masked_where_no_wrapper_leaves_the_weight_to_it(results):
    assert [result["storage"] for result in results] == ["masked"] * RANKS
