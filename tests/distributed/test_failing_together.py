"""What fails in one process of two ends both: each says why, and what was learnt is saved by both together."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import rarefy
from ranks import NEEDS_FULLY_SHARD, in_processes
from rarefy.checkpoint.directory import load
from rarefy.checkpoint.writing import frozen
from rarefy.distributed import failing_together
from rarefy.errors import RarefyError

pytestmark = NEEDS_FULLY_SHARD
STEPS = 6
CASES = [
    ("ddp", "snip"),
    ("ddp", "wanda"),
    ("ddp", "grasp"),
    ("ddp", "synflow"),
    ("ddp", "first data"),
    ("ddp", "data"),
    ("fsdp2", "snip"),
    ("fsdp2", "first data"),
    ("fsdp2", "data"),
    ("fsdp2", "disk"),
]
# Methods that measure first masks, and the forward pass that fails; two look at shapes before all else.
METHODS = {"snip": 1, "wanda": 1, "grasp": 0, "synflow": 0}


class Net(nn.Module):
    """Fails in one process at a call, counted from the first one."""

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
        self.fails_at = fails_at

    def forward(self, x: Tensor) -> Tensor:
        if self.fails_at == 0 and dist.get_rank() == 1:
            raise ValueError("own words")
        if self.fails_at:
            self.fails_at -= 1
        return self.layers(x).square().mean()


class Data:
    """Batches, of which one process cannot read one."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 10

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(len(self)):
            if index == self.fails_at and dist.get_rank() == 1:
                raise OSError("own words")
            yield torch.randn(4, 16, generator=torch.Generator().manual_seed(index))


def run(folder: Path, strategy: str, fault: str) -> str:
    """How a run ends."""
    method = fault if fault in METHODS else "snip"
    measures = {"init_method": {"name": method, "batches": 2}} if fault not in ("data", "disk") else {}
    fails_at = METHODS.get(fault)
    trainer = rarefy.Trainer(
        model_dir=folder / f"{strategy} {fault}",
        model=partial(Net, fails_at),
        device="cpu",
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        sparsity={"algorithm": "set", "sparsity": 0.5, "update": {"freq": 2}, **measures},
        parallel={"strategy": strategy},
        loop={"num_steps": STEPS},
        checkpoint={"steps": 2},
        loggers=[],
        seed=1,
    )
    data = Data({"first data": 1, "data": 3}.get(fault))
    try:
        trainer.fit(data)
    except Exception as error:
        return str(error)
    return "nothing failed"


def without_a_disk(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


class WordlessError(Exception):
    """Has no words."""


def without_words(rank: int) -> str:
    """An error of the first process."""
    try:
        with failing_together(torch.device("cpu")):
            if rank == 0:
                raise WordlessError
    except (WordlessError, RarefyError) as error:
        return str(error)
    return "nothing failed"


def work(folder: Path, rank: int) -> dict[tuple[str, str], str]:
    found = {("", ""): without_words(rank)}
    for case in CASES:
        with pytest.MonkeyPatch.context() as patch:
            if case[1] == "disk" and rank == 1:
                patch.setattr(frozen, "write_file", without_a_disk)
            found[case] = run(folder, *case)
        dist.barrier()
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def found(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[tuple[str, str], str]]:
    return in_processes(2, partial(work, folder), tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize(("strategy", "fault"), [case for case in CASES if case[1] != "disk"])
def test_both_end_with_the_words_of_the_one_that_failed(found: Any, strategy: str, fault: str) -> None:
    other, failed = (one[strategy, fault] for one in found)
    assert failed == "own words"
    prefix = f"init_method {fault}: " if fault in METHODS else ""
    assert other == f"{prefix}process 1 of 2 failed: own words"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_what_was_learnt_before_bad_data_is_saved(found: Any, folder: Path, strategy: str) -> None:
    names = sorted(path.name for path in (folder / f"{strategy} data").glob("checkpoint_*"))
    assert names == ["checkpoint_2", "checkpoint_3"]
    saved = load(folder / f"{strategy} data" / "checkpoint_3")
    assert saved.state["data"]["batch"] == 3
    assert saved.model["layers.0.weight"].shape == (16, 16)


def test_a_full_disk_of_one_process_ends_both(found: Any, folder: Path) -> None:
    other, failed = (one["fsdp2", "disk"] for one in found)
    assert "process 1 could not write its pieces: No space left on device" in other
    assert "cannot be written: No space left on device" in failed
    assert not list((folder / "fsdp2 disk").glob("*checkpoint_*"))


def test_in_one_process_an_error_is_what_it_was() -> None:
    with pytest.raises(KeyError), failing_together(torch.device("cpu")):
        raise KeyError("x")


def test_an_error_without_words_is_named(found: Any) -> None:
    assert [one["", ""] for one in found] == ["", "process 0 of 2 failed: WordlessError"]
