"""In two processes that others wrap: the masks and weights of one process, and zeros that stay zeros."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ranks import in_processes
from two_ranks import (
    BATCH,
    EVERY_STATE,
    RIGL,
    STEPS,
    Found,
    Net,
    adamw,
    assert_same,
    assert_zeros,
    own_batches,
    result,
    rows,
)

accelerate = pytest.importorskip("accelerate")
lightning = pytest.importorskip("pytorch_lightning")
transformers = pytest.importorskip("transformers")

from rarefy.integrations import lightning as for_lightning  # noqa: E402
from rarefy.integrations import transformers as for_transformers  # noqa: E402
from rarefy.integrations.accelerate import sparsify  # noqa: E402


def with_accelerate(rank: int, folder: Path) -> Found:
    accelerator = accelerate.Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    model = Net()
    optimizer = adamw(model)
    sparsity = sparsify(accelerator, RIGL, model, optimizer)
    network, wrapped = accelerator.prepare(model, optimizer)
    assert isinstance(network, DistributedDataParallel)
    for batch in own_batches(rank, 2):
        wrapped.zero_grad()
        accelerator.backward(network(batch)["loss"])
        wrapped.step()
    return result(sparsity, optimizer)


class InOrder(transformers.Trainer):
    """Takes the rows as they come."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def with_transformers(rank: int, folder: Path) -> Found:
    args = transformers.TrainingArguments(
        output_dir=str(folder / "transformers"),
        use_cpu=True,
        per_device_train_batch_size=BATCH // 2,
        max_steps=STEPS,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0.0,
    )
    assert args.world_size == 2
    model = Net()
    optimizer = adamw(model)
    callback = for_transformers.SparsityCallback(RIGL)
    data: Any = [{"x": row} for row in rows()]
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    trainer = InOrder(
        model=model, args=args, train_dataset=data, callbacks=[callback], optimizers=(optimizer, constant)
    )
    trainer.train()
    assert isinstance(trainer.model_wrapped, DistributedDataParallel)
    return result(callback.sparsity, optimizer)


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        # Under the same names as alone: the first masks are drawn by name.
        self.layers = Net().layers

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return (self.layers(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        self.used = adamw(self)
        return self.used


def with_lightning(rank: int, folder: Path) -> Found:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = for_lightning.SparsityCallback(RIGL)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        # Lightning's own shuffles the rows.
        use_distributed_sampler=False,
        max_steps=STEPS,
        callbacks=[callback],
        enable_model_summary=False,
        **quiet,
    )
    module = Module()
    data: Any = rows()
    in_order = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=BATCH // 2, sampler=in_order))
    assert trainer.world_size == 2
    return result(callback.sparsity, module.used)


CASES: dict[str, Callable[[int, Path], Found]] = {
    "Accelerate": with_accelerate,
    "Transformers": with_transformers,
    # Last: it ends the process group that it trained in.
    "Lightning": with_lightning,
}


def work(folder: Path, port: int, rank: int) -> dict[str, Found]:
    """Every case, in a process that looks as if torchrun had started it."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
    os.environ |= {"GROUP_RANK": "0"}
    return {name: case(rank, folder) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    """What both processes found; one start of processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return in_processes(2, partial(work, folder, port), folder)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_learns_what_one_process_learns(case: str, results: list[dict[str, Found]]) -> None:
    for rank in results:
        assert_same(rank[case])
        assert assert_zeros(rank[case]) == EVERY_STATE
