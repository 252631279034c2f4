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
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from ranks import NEEDS_FULLY_SHARD, in_processes
from two_ranks import (
    BATCH,
    EVERY_STATE,
    RATE,
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

from accelerate.state import AcceleratorState, PartialState  # noqa: E402
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, fsdp_utils  # noqa: E402
from pytorch_lightning.strategies import ModelParallelStrategy  # noqa: E402

from rarefy.distributed import is_cut  # noqa: E402
from rarefy.errors import RarefyError  # noqa: E402
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


def cut_by_accelerate() -> Any:
    """An accelerator that takes FSDP2, which Accelerate itself does on other devices than the CPU only."""
    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
    )
    return accelerator


def with_accelerate_fsdp2(rank: int, folder: Path) -> Found:
    accelerator = cut_by_accelerate()
    model = Net()
    optimizer = adamw(model)
    with pytest.raises(RarefyError, match=r"sparsify before accelerator\.prepare is not allowed under FSDP2"):
        sparsify(accelerator, RIGL, model, optimizer)
    network, wrapped = accelerator.prepare(model, optimizer)
    sparsity = sparsify(accelerator, RIGL, network, wrapped)
    assert is_cut(model.layers[0].weight)
    plugin = accelerator.state.fsdp_plugin
    half = STEPS // 2
    batches = own_batches(rank, 2)

    def learn(several: list[Tensor]) -> None:
        for batch in several:
            wrapped.zero_grad()
            accelerator.backward(network(batch)["loss"])
            wrapped.step()

    learn(batches[:half])
    saved = str(folder / "accelerate")
    fsdp_utils.save_fsdp_model(plugin, accelerator, network, saved)
    fsdp_utils.save_fsdp_optimizer(plugin, accelerator, optimizer, network, saved)
    state = sparsity.state_dict()
    # Back to here, from where everything is otherwise by then.
    learn(batches[half:])
    fsdp_utils.load_fsdp_model(plugin, accelerator, network, saved)
    fsdp_utils.load_fsdp_optimizer(plugin, accelerator, optimizer, network, saved)
    sparsity.load_state_dict(state)
    learn(batches[half:])
    found = result(sparsity, optimizer)
    AcceleratorState._reset_state(True)
    return found


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


class CutByTransformers(InOrder):
    """A Trainer that takes FSDP2, which Accelerate itself does on other devices than the CPU only."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        # The second is made of the first whenever somebody asks for it.
        for one in (PartialState(), state):
            one.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
        self.is_fsdp_enabled = True


def train_cut(folder: Path, states: str, checkpoint: str | None = None) -> Found:
    """A run under FSDP2 that saves full or sharded state dicts."""
    args = transformers.TrainingArguments(
        output_dir=str(folder / f"transformers {states}"),
        use_cpu=True,
        per_device_train_batch_size=BATCH // 2,
        max_steps=STEPS,
        save_steps=4,
        report_to="none",
        disable_tqdm=True,
        max_grad_norm=0.0,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        fsdp=True,
        fsdp_config={"version": 2, "auto_wrap_policy": "NO_WRAP", "state_dict_type": states},
    )
    callback = for_transformers.SparsityCallback(RIGL)
    data: Any = [{"x": row} for row in rows()]
    model = Net()
    trainer = CutByTransformers(model=model, args=args, train_dataset=data, callbacks=[callback])
    trainer.train(resume_from_checkpoint=checkpoint and f"{args.output_dir}/{checkpoint}")
    assert is_cut(model.layers[0].weight)
    found = result(callback.sparsity, trainer.optimizer.optimizer)
    if checkpoint and states == "FULL_STATE_DICT":
        trainer.save_model(str(folder / "saved"))
    AcceleratorState._reset_state(True)
    return found


def with_transformers_fsdp2(states: str, rank: int, folder: Path) -> Found:
    steady = train_cut(folder, states)
    resumed = train_cut(folder, states, "checkpoint-4")
    assert all(torch.equal(resumed[name], value) for name, value in steady.items())
    if states == "FULL_STATE_DICT":
        torch.distributed.barrier()
        saved = load_file(folder / "saved" / "model.safetensors")
        assert saved.keys() == dict(Net().named_parameters()).keys()
        for name in ("layers.0.weight", "layers.2.weight"):
            assert torch.equal(saved[name], resumed[f"{name} weight"])
    return resumed


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


class CutModule(Module):
    def configure_model(self) -> None:
        if not is_cut(self.layers[0].weight):
            fully_shard(self.layers, mesh=self.device_mesh["data_parallel"])


def with_lightning_model_parallel(rank: int, folder: Path) -> Found:
    return with_lightning(rank, folder, CutModule(), ModelParallelStrategy(2, 1))


class Halves(DistributedSampler[Any]):
    """Every other row of the first half of the data, and of the second half in the second epoch."""

    def __iter__(self) -> Any:
        half = STEPS * BATCH // 2
        return iter(range(self.epoch * half + self.rank, (self.epoch + 1) * half, 2))

    def __len__(self) -> int:
        return STEPS * BATCH // 4


def fit_in_halves(rank: int, folder: Path, checkpoint: Path | None = None) -> Found:
    callback = for_lightning.SparsityCallback(RIGL)
    saving = lightning.callbacks.ModelCheckpoint(folder, "{epoch}", every_n_epochs=1, save_top_k=-1)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(2, 1),
        use_distributed_sampler=False,
        max_epochs=2,
        callbacks=[callback, saving],
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
    )
    module = CutModule()
    data: Any = rows()
    halves = Halves(data, num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=BATCH // 2, sampler=halves), ckpt_path=checkpoint)
    assert callback.sparsity.step == STEPS  # type: ignore[attr-defined]
    return result(callback.sparsity, module.used)


def with_lightning_model_parallel_resumed(rank: int, folder: Path) -> Found:
    steady = fit_in_halves(rank, folder / "lightning")
    resumed = fit_in_halves(rank, folder / "lightning resumed", folder / "lightning" / "epoch=0.ckpt")
    assert all(torch.equal(resumed[name], value) for name, value in steady.items())
    return resumed


def with_lightning(rank: int, folder: Path, module: Any = None, strategy: Any = "ddp") -> Found:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    callback = for_lightning.SparsityCallback(RIGL)
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        # Lightning's own shuffles the rows.
        use_distributed_sampler=False,
        max_steps=STEPS,
        callbacks=[callback],
        enable_model_summary=False,
        **quiet,
    )
    module = module or Module()
    data: Any = rows()
    in_order = DistributedSampler(data, num_replicas=2, rank=rank, shuffle=False)
    trainer.fit(module, DataLoader(data, batch_size=BATCH // 2, sampler=in_order))
    assert trainer.world_size == 2
    return result(callback.sparsity, module.used)


CASES: dict[str, Callable[[int, Path], Found]] = {
    "Accelerate": with_accelerate,
    "Accelerate, FSDP2": with_accelerate_fsdp2,
    "Transformers": with_transformers,
    "Transformers, FSDP2, full": partial(with_transformers_fsdp2, "FULL_STATE_DICT"),
    "Transformers, FSDP2, sharded": partial(with_transformers_fsdp2, "SHARDED_STATE_DICT"),
    "Lightning, ModelParallelStrategy": with_lightning_model_parallel,
    "Lightning, ModelParallelStrategy, resumed": with_lightning_model_parallel_resumed,
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
@NEEDS_FULLY_SHARD
@pytest.mark.parametrize("case", CASES)
def test_it_learns_what_one_process_learns(case: str, results: list[dict[str, Found]]) -> None:
    for rank in results:
        assert_same(rank[case])
        assert assert_zeros(rank[case]) == EVERY_STATE
