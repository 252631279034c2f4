"""First masks that the Trainer measures on its data: nothing else of the run moves, and a resumed run has them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import rarefy
import tiny_run
from forks import Script
from ranks import NEEDS_FULLY_SHARD
from rarefy.callbacks.events import Callback
from rarefy.errors import RarefyError
from rarefy.first_masks.kinds import Snip
from rarefy.trainer.feed import TrainFeed

SNIP = {"algorithm": "static", "sparsity": 0.5, "init_method": {"name": "snip", "batches": 2}}


class Noisy(nn.Module):
    """A loss with a batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(8, 16)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.2)
        self.head = nn.Linear(16, 1)

    def forward(self, batch: Any) -> torch.Tensor:
        x = batch[0] if isinstance(batch, list) else batch
        return (
            (self.head(self.drop(torch.relu(self.norm(self.body(x))))) - x.sum(1, keepdim=True))
            .square()
            .mean()
        )


class Seen(Callback):
    """Remembers the batches and what is drawn beside them."""

    def __init__(self) -> None:
        self.batches: list[torch.Tensor] = []
        self.norms: list[torch.Tensor] = []
        self.states: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Any, batch: Any, index: int) -> None:
        self.batches.append(batch[0] if isinstance(batch, list) else batch)
        self.norms.append(trainer.model.norm.running_mean.clone())
        self.states.append(torch.get_rng_state())


def shuffled() -> DataLoader:
    data = TensorDataset(torch.arange(24 * 8.0).view(24, 8).sin())
    return DataLoader(data, batch_size=4, shuffle=True)


def trained(
    folder: Path, sparsity: Any, data: Any, steps: int = 8, **options: Any
) -> tuple[rarefy.Trainer, Seen]:
    seen = Seen()
    trainer = rarefy.Trainer(
        model_dir=folder,
        model=Noisy,
        device="cpu",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        sparsity=copy.deepcopy(sparsity),
        loop={"max_steps": steps, "eval_frequency": 0},
        callbacks=[seen],
        loggers=[],
        seed=4,
        **options,
    )
    trainer.fit(data)
    return trainer, seen


def masks_of(trainer: rarefy.Trainer) -> dict[str, torch.Tensor]:
    return {
        name: one.mask for member in trainer.sparsity.algorithms for name, one in member.parameters.items()
    }


@pytest.mark.parametrize(
    "make", [shuffled, lambda: iter([torch.full((4, 8), 0.1 * i) for i in range(1, 13)])]
)
def test_the_order_of_data_statistics_and_random_numbers_do_not_move(tmp_path, make):
    plain, before = trained(tmp_path / "a", 0.5, make())
    measured, after = trained(tmp_path / "b", SNIP, make())
    assert len(before.batches) == len(after.batches) == 8
    assert all(map(torch.equal, before.batches, after.batches))
    assert torch.equal(before.norms[0], after.norms[0]) and not before.norms[0].any()
    assert all(map(torch.equal, before.states, after.states))
    assert not all(torch.equal(one, masks_of(plain)[name]) for name, one in masks_of(measured).items())


def test_the_masks_are_those_of_the_first_batches(tmp_path):
    measured, seen = trained(tmp_path, SNIP, shuffled())
    torch.manual_seed(4)
    model = Noisy()
    method = Snip(batches=seen.batches[:2])
    sparsity = rarefy.Static(0.5, init_method=method, seed=4)
    sparsity.apply(model)
    assert all(torch.equal(one.mask, masks_of(measured)[name]) for name, one in sparsity.parameters.items())


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "wanda"])
@pytest.mark.parametrize("compute", ["masked", "compact", "auto"])
def test_a_resumed_run_measures_nothing_and_goes_on_bit_for_bit(tmp_path, monkeypatch, name, compute):
    block = {**SNIP, "compute": compute, "init_method": {"name": name, "batches": 2}}
    whole, _ = trained(tmp_path / "whole", block, shuffled())
    trained(tmp_path / "parts", block, shuffled(), steps=4)

    def fail(*_: Any) -> None:
        raise AssertionError("measured once more")

    monkeypatch.setattr(rarefy.SparsityAlgorithm, "measured", fail)
    resumed, _ = trained(tmp_path / "parts", block, shuffled())
    state = resumed.model.state_dict()
    assert all(torch.equal(one, state[name]) for name, one in whole.model.state_dict().items())


def test_weights_and_masks_alone_are_not_measured_again(tmp_path, monkeypatch):
    first, _ = trained(tmp_path / "a", SNIP, shuffled(), steps=2)
    expected = {name: one.clone() for name, one in masks_of(first).items()}
    monkeypatch.setattr(rarefy.SparsityAlgorithm, "measured", None)
    trainer = rarefy.Trainer(
        model_dir=tmp_path / "b",
        model=Noisy,
        device="cpu",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        sparsity=copy.deepcopy(SNIP),
        loop={"num_steps": 1},
        loggers=[],
    )
    trainer.fit(shuffled(), ckpt_path=tmp_path / "a" / "checkpoint_2", load_states="model")
    assert all(torch.equal(one, expected[name]) for name, one in masks_of(trainer).items())


def test_a_dense_checkpoint_is_measured_with_its_own_weights(tmp_path):
    dense, _ = trained(tmp_path / "dense", None, shuffled(), steps=3)
    weights = {name: one.detach().clone() for name, one in dense.model.named_parameters()}
    trainer = rarefy.Trainer(
        model_dir=tmp_path / "sparse",
        model=Noisy,
        device="cpu",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        sparsity={**SNIP, "init_method": {"name": "wanda", "batches": 6}},
        loop={"num_steps": 1},
        loggers=[],
        checkpoint={"disable_strict_checkpoint_loading": True},
    )
    trainer.fit(shuffled(), ckpt_path=tmp_path / "dense" / "checkpoint_3", load_states="model")
    x = torch.cat([batch[0] for batch in shuffled()])
    scores = weights["body.weight"].abs() * x.norm(dim=0)
    mask = masks_of(trainer)["body.weight"]
    expected = torch.zeros_like(mask).scatter_(1, scores.topk(4, dim=1).indices, True)
    assert torch.equal(mask, expected)


def test_a_state_saved_before_the_fit_still_waits(tmp_path):
    options: dict[str, Any] = {"model": Noisy, "device": "cpu", "loggers": [], "seed": 1, "sparsity": SNIP}
    options["optimizer"] = lambda model: torch.optim.SGD(model.parameters(), lr=0.01)
    early = rarefy.Trainer(model_dir=tmp_path, loop={"num_steps": 1}, **options)
    early.save_checkpoint()
    early.writer.wait()
    assert early.sparsity.algorithms[0].awaiting == {"body.weight", "head.weight"}
    trainer = rarefy.Trainer(model_dir=tmp_path, loop={"num_steps": 1}, **options)
    trainer.fit(shuffled())
    total = sum(int(one.sum()) for one in masks_of(trainer).values())
    assert total == 72 and not trainer.sparsity.algorithms[0].awaiting


def test_batches_of_ones_own_in_a_trainer(tmp_path):
    data = [torch.randn(4, 8, generator=torch.Generator().manual_seed(0))]
    trainer, _ = trained(
        tmp_path, {**SNIP, "init_method": {"name": "snip", "batches": data}}, shuffled(), steps=1
    )
    assert sum(int(one.sum()) for one in masks_of(trainer).values()) == 72


def test_more_batches_than_an_epoch_has(tmp_path, caplog):
    trained(tmp_path, {**SNIP, "init_method": {"name": "snip", "batches": 99}}, shuffled(), steps=1)
    assert "init_method: an epoch has 6 batches, fewer than batches: 99" in caplog.text


class Empty:
    """Does not say that it has no batch."""

    def __iter__(self) -> Any:
        return iter(())


def test_data_without_a_batch(tmp_path):
    with pytest.raises(RarefyError, match="the training data gave no batch to measure first masks on"):
        trained(tmp_path, SNIP, Empty())


@pytest.mark.parametrize("algorithm", ["set", "rigl", "gmp"])
def test_methods_that_update(tmp_path, algorithm):
    block = copy.deepcopy(tiny_run.SPARSITY[algorithm])
    block["init_method"] = {"name": "snip", "batches": 1}
    trainer, _ = trained(tmp_path, block, shuffled())
    for leaf in trainer.sparsity.algorithms:
        assert leaf.updates > 1 and not leaf.awaiting


def test_a_group_of_two_methods(tmp_path):
    entries = [
        {"sparsity": 0.5, "param_filter": "body.weight", "init_method": {"name": "wanda", "batches": 1}},
        {"sparsity": 0.75, "param_filter": "head.weight", "init_method": {"name": "snip", "batches": 3}},
    ]
    trainer, _ = trained(tmp_path, entries, shuffled(), steps=2)
    assert [int(one.sum()) for one in masks_of(trainer).values()] == [64, 4]


def test_from_a_file(tmp_path):
    block = {"algorithm": "static", "sparsity": 0.75, "init_method": {"name": "snip", "batches": 2}}
    path = tiny_run.write(tmp_path, tiny_run.configuration(tmp_path, block))
    assert tiny_run.rarefy("run", path, "--validate_only").exit_code == 0
    result = tiny_run.rarefy("run", path)
    assert result.exit_code == 0, result.output
    found = rarefy.checkpoint.directory.load(tmp_path / "out" / "checkpoint_6").model
    total = sum(int(one.sum()) for name, one in found.items() if name.endswith("_mask"))
    assert total == round(0.25 * (8 * 16 + 16 * 16 + 16))


def test_parts_of_a_batch_are_measured_one_by_one(tmp_path):
    class Splits(Noisy):
        def parts_of(self, batch: Any, size: int) -> Any:
            sizes.append(size)
            return [batch]

    sizes: list[int] = []
    trainer = rarefy.Trainer(
        model_dir=tmp_path,
        model=Splits,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.01),
        sparsity=copy.deepcopy(SNIP),
        device="cpu",
        loop={"num_steps": 1, "micro_batch_size": 2},
        loggers=[],
    )
    trainer.fit([torch.ones(4, 8), torch.zeros(4, 8)])
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_that_live_on_start_anew(workers):
    class Draws(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, index: int) -> torch.Tensor:
            return torch.rand(1)

    def read(ahead: int) -> list[torch.Tensor]:
        torch.manual_seed(3)
        loader = DataLoader(Draws(), batch_size=2, num_workers=workers, persistent_workers=workers > 0)
        feed = TrainFeed(loader)
        first = feed.ahead(ahead)
        found = [feed.next_step()[0] for _ in range(4)]
        feed.close()
        assert all(map(torch.equal, first, found))
        return found

    assert all(map(torch.equal, read(0), read(2)))


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
import rarefy
import rarefy.errors
from rarefy.distributed import from_all, whole
from rarefy.trainer.trainer import Trainer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch):
        return (self.second(self.first(batch).relu()) - batch).square().mean()

folder, rank, ranks = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if ranks > 1:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks)
every = list(torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(0)))
found = {}
for name in ("snip", "grasp", "wanda", "synflow"):
    trainer = Trainer(
        model_dir=f"{folder}/{name}{ranks}", model=Net, device="cpu", loggers=[], seed=1,
        sparsity={"sparsity": 0.5, "compute": sys.argv[4], "init_method": {"name": name, "batches": 4 // ranks}},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.0),
        loop={"num_steps": 1}, parallel={"strategy": sys.argv[5]},
    )
    trainer.fit(every[rank::ranks])
    found[name] = [whole(one.mask).tolist() for one in trainer.sparsity.parameters.values()]
    assert ranks == 1 or isinstance(trainer.model.first.weight, DTensor) == (sys.argv[5] == "fsdp2")
for method in ("wanda", "sparsegpt"):
    torch.manual_seed(0)
    model = Net()
    done = rarefy.prune(model, 0.5, method=method, batches=every[rank::ranks])
    found[f"prune {method}"] = [one.tolist() for one in done.masks.values()]
    found[f"losses {method}"] = [round(done.loss_before, 4), round(done.loss_after, 4)]
    everywhere = from_all((list(model.state_dict().values()), done.loss_before, done.loss_after))
    for weights, *losses in everywhere:
        assert all(map(torch.equal, weights, everywhere[0][0])) and losses == list(everywhere[0][1:])
if ranks > 1:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    try:
        rarefy.prune(model, 0.5, batches=every[:1], loss=lambda model, x: model[0](model[rank](x)).sum())
    except rarefy.errors.RarefyError as error:
        assert "1.weight is not used by the batches of each process" in str(error)
    else:
        raise AssertionError("a layer that one process does not use")
if rank == 0:
    print(found)
if ranks > 1:
    dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    ("compute", "strategy"),
    [("masked", "ddp"), ("compact", "ddp"), pytest.param("auto", "fsdp2", marks=NEEDS_FULLY_SHARD)],
)
def test_two_processes_find_the_masks_of_one(tmp_path, compute, strategy):
    runs = [
        Script(SCRIPT, str(tmp_path), str(rank), str(ranks), compute, strategy, folder=tmp_path)
        for ranks, rank in ((1, 0), (2, 0), (2, 1))
    ]
    outputs = [run.end(timeout=120) for run in runs]
    assert all(code == 0 for code, *_ in outputs), outputs
    assert outputs[0][1] == outputs[1][1] != ""
