"""`strategy: fsdp2` trains the model of one process, and writes its pieces from every process."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed import fsdp

from ranks import NEEDS_FULLY_SHARD, start_copies
from rarefy.callbacks.events import Callback
from rarefy.checkpoint import directory
from rarefy.checkpoint.dcp import storage_writer
from rarefy.checkpoint.directory import CheckpointParts, load, newest_valid, save
from rarefy.checkpoint.error import CheckpointError
from rarefy.distributed import Parallel, ParallelConfig, is_cut, local_part, whole
from rarefy.distributed.fully_shard import blocks_of
from rarefy.errors import ConfigError, RarefyError
from rarefy.trainer.state import restore
from rarefy.trainer.trainer import Trainer
from rarefy.validation.block import read_block

pytestmark = NEEDS_FULLY_SHARD
RANKS = 2
STEPS, HALF = 24, 12
SPARSITY = {"algorithm": "rigl", "sparsity": 0.5, "drop_fraction": 0.5, "update": {"freq": 5}}


CLIPPED = {"enabled": False, "max_gradient_norm": 0.05}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(9, 9)

    def forward(self, x):
        return x + self.inner(x).tanh()


class Net(nn.Module):
    """Weights of odd sizes, in blocks and outside of them."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 9)
        self.layers = nn.ModuleList([Block(), Block()])
        self.last = nn.Linear(9, 8)

    def forward(self, batch):
        x = self.first(batch)
        for layer in self.layers:
            x = layer(x)
        return (self.last(x) - batch).square().mean()


class Seen(Callback):
    """Keeps loss and norm of every step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, metrics):
        self.steps.append((metrics["loss"], metrics["grad_norm"]))


class Gathered(Callback):
    """Keeps which weights are whole after each forward pass, and how many rows of the first one a process has."""

    def __init__(self):
        self.whole = []
        self.rows = []

    def on_after_forward(self, trainer, outputs, batch):
        if not trainer.model.training:
            return
        weights = dict(trainer.model.named_parameters())
        self.whole.append([not is_cut(weights[name]) for name in ("first.weight", "layers.0.inner.weight")])

    def on_train_batch_end(self, trainer, metrics):
        self.rows.append(len(local_part(trainer.model.state_dict()["first.weight"])))


def batches(rank, ranks):
    every = torch.randn(STEPS * 2, 4, 8, generator=torch.Generator().manual_seed(0))
    return list(every[rank::ranks])


def adam(model):
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def train(folder, rank=0, ranks=1, steps=STEPS, **options):
    """What a run saw and has in the end."""
    seen = Seen()
    more = options.pop("callbacks", [])
    trainer = Trainer(
        model_dir=folder,
        device="cpu",
        loggers=[],
        callbacks=[seen, *more],
        seed=1,
        loop={"num_steps": steps, "grad_accum_steps": 2 // ranks},
        checkpoint={"steps": HALF},
        **{"model": Net, "optimizer": adam, "precision": CLIPPED, "sparsity": SPARSITY, **options},
    )
    trainer.fit(batches(rank, ranks), [torch.ones(2, 8)])
    state = trainer.model.state_dict()
    whole = {name: t.full_tensor() if hasattr(t, "full_tensor") else t.clone() for name, t in state.items()}
    return {"steps": seen.steps, "state": whole}


def held(folder, rank, **parallel):
    """What is whole after a forward pass, and rows of a weight in this process."""
    gathered = Gathered()
    train(folder, rank, RANKS, 1, parallel={"strategy": "fsdp2", **parallel}, callbacks=[gathered])
    return gathered.whole[0], gathered.rows[0]


def copies(folder, rank, parallel):
    """Each process has the whole model; none may take itself for the only one that saves it."""

    def alone(*_):
        raise AssertionError("written by one process for itself")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "_write", alone)
        return train(folder, rank, RANKS, HALF, parallel=parallel)


def carried(folder, rank):
    """The optimizer's state that another phase takes over, and the parts of the checkpoint that were read whole."""
    read = directory.read_pieces
    whole_parts = []

    def reading(path, part, state):
        whole_parts.append(part)
        return read(path, part, state)

    trainer = Trainer(
        model_dir=folder / "carried",
        model=Net,
        device="cpu",
        optimizer=adam,
        sparsity=SPARSITY,
        parallel={"strategy": "fsdp2"},
        loggers=[],
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(directory, "read_pieces", reading)
        restore(trainer.session, folder / "run" / f"checkpoint_{HALF}", "model,optimizer")
    states = trainer.optimizer.state_dict()["state"]
    cut = {index: is_cut(state["exp_avg"]) for index, state in states.items()}
    states = {i: {key: whole(value) for key, value in state.items()} for i, state in states.items()}
    return states, cut, whole_parts


def policies():
    """What torch is told to do with pieces, with and without the key."""
    given = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp, "fully_shard", lambda module, **options: given.append(options))
        for config in ({}, {"cpu_offload": True}):
            cut = read_block(ParallelConfig, {"strategy": "fsdp2", **config}, "parallel")
            Parallel(cut).cut(nn.Linear(2, 2), torch.device("cpu"))
    without, offloaded = given
    return "offload_policy" in without, offloaded["offload_policy"] == fsdp.CPUOffloadPolicy(pin_memory=False)


def without_a_cpu_group():
    """What a process group is told that sends from GPUs alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "get_backend_config", lambda group=None: "cuda:nccl")
        cut = Parallel(read_block(ParallelConfig, {"strategy": "fsdp2", "cpu_offload": True}, "parallel"))
        return told(lambda: cut.cut(nn.Linear(2, 2), torch.device("cpu")))


def with_an_old_torch():
    """What torch 2.6 would be told, whose streams of the CPU cannot do what `fully_shard` asks of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "Stream", object)
        patch.setattr(torch, "__version__", "2.6.0")
        cut = Parallel(read_block(ParallelConfig, {"strategy": "fsdp2"}, "parallel"))
        return told(lambda: cut.cut(nn.Linear(2, 2), torch.device("cpu")))


def told(action):
    try:
        action()
    except (CheckpointError, RarefyError) as error:
        return str(error)
    return ""


def refused(folder, rank):
    cut = {"strategy": "fsdp2"}
    model = Net()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    half = {"fp16_type": "float16", "loss_scaling_factor": "dynamic"}
    return {
        "cpu_offload": without_a_cpu_group(),
        "device": with_an_old_torch(),
        "compact": told(
            lambda: train(folder, rank, RANKS, parallel=cut, sparsity={**SPARSITY, "compute": "compact"})
        ),
        "optimizer": told(lambda: train(folder, rank, RANKS, parallel=cut, model=model, optimizer=made)),
        "float16": told(lambda: train(folder, rank, RANKS, parallel=cut, precision=half)),
        "shard_size": told(lambda: train(folder, rank, RANKS, parallel={**cut, "shard_size": 3})),
    }


def parts_of(value):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    cut = distribute_tensor(torch.full((3, 2), float(value)), mesh, [Shard(0)])
    return CheckpointParts(model={"cut": cut, "tied": cut, "whole": torch.ones(2)}, state={"step": value})


def failing(folder, rank):
    """What each process is told when one cannot write, and when the first one cannot make the folder."""
    write = storage_writer.write_parts

    def full(*_):
        raise OSError(28, "No space left on device")

    save(Path(folder), 1, parts_of(1))
    storage_writer.write_parts = full if rank == 1 else write
    one = told(lambda: save(Path(folder), 2, parts_of(2)))
    storage_writer.write_parts = write
    Path(folder, "file").touch()
    return one, told(lambda: save(Path(folder, "file"), 2, parts_of(2)))


def work(rank, address, folder):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    parallel = {"strategy": "fsdp2", "reshard_after_forward": True}
    results = {
        "run": train(Path(folder, "run"), rank, RANKS, parallel=parallel),
        "first half": train(Path(folder, "halves"), rank, RANKS, steps=HALF, parallel=parallel),
        "second half": train(Path(folder, "halves"), rank, RANKS, steps=HALF, parallel=parallel),
        "bfloat16": train(
            Path(folder, "16"), rank, RANKS, HALF, parallel={**parallel, "mixed_precision": "bfloat16"}
        ),
        "offloaded": train(
            Path(folder, "offloaded"), rank, RANKS, HALF, parallel={**parallel, "cpu_offload": True}
        ),
        "policies": policies(),
        "carried": carried(Path(folder), rank),
        "held": {
            "by default": held(Path(folder, "0"), rank),
            "put away": held(Path(folder, "1"), rank, reshard_after_forward=True),
            "kept": held(Path(folder, "2"), rank, reshard_after_forward=False),
            "one copy each": held(Path(folder, "3"), rank, shard_size=1),
        },
        "copies": copies(Path(folder, "copies"), rank, {**parallel, "shard_size": 1}),
        "refused": refused(Path(folder, "none"), rank),
        "failing": failing(Path(folder, "failing"), rank),
    }
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def killed(rank, address, folder):
    """The second process is killed in the middle of its second checkpoint."""
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=RANKS)
    save(Path(folder), 1, parts_of(1))
    if rank == 1:
        storage_writer.write_parts = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    save(Path(folder), 2, parts_of(2))


def start(function, folder):
    start_copies(function, RANKS, f"file://{folder}/rendezvous", str(folder))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("two")
    start(work, made)
    return made


@pytest.fixture(scope="module")
def results(folder):
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


def test_losses_norms_and_masks_are_those_of_one_process(results, tmp_path):
    expected = train(tmp_path)
    for result in results:
        found = result["run"]
        assert len(found["steps"]) == STEPS
        torch.testing.assert_close(found["steps"], expected["steps"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found["state"], expected["state"], rtol=1e-4, atol=1e-5)
        masks = {name: mask for name, mask in expected["state"].items() if name.endswith("mask")}
        assert len(masks) == 4 and all(
            torch.equal(found["state"][name], mask) for name, mask in masks.items()
        )


def test_a_resumed_run_is_the_uninterrupted_one(results):
    for result in results:
        assert result["first half"]["steps"] + result["second half"]["steps"] == result["run"]["steps"]
        state = result["second half"]["state"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in result["run"]["state"].items())


def test_mixed_precision_trains_too(results):
    losses, exact = ([loss for loss, _ in results[0][name]["steps"]] for name in ("bfloat16", "first half"))
    assert losses != exact and losses[-1] < losses[0]
    # Masks may part at the first update, and the losses with them.
    assert losses[:5] == pytest.approx(exact[:5], rel=0.01)


def test_mixed_precision_keeps_the_weights_in_their_format(results):
    assert {tensor.dtype for tensor in results[0]["bfloat16"]["state"].values()} == {
        torch.float32,
        torch.bool,
    }


def test_pieces_on_the_cpu_learn_the_same(results, folder):
    for result in results:
        assert result["policies"] == (False, True)
        assert result["offloaded"]["steps"] == result["first half"]["steps"]
        state = result["first half"]["state"]
        assert all(torch.equal(tensor, state[name]) for name, tensor in result["offloaded"]["state"].items())
    halves, offloaded = (load(folder / name / f"checkpoint_{HALF}") for name in ("halves", "offloaded"))
    for index, state in halves.optimizer["state"].items():
        for key, value in state.items():
            assert torch.equal(offloaded.optimizer["state"][index][key], value)


def test_what_is_put_away_after_a_forward_pass(results):
    for result in results:
        # The first weight is outside of the blocks, which torch keeps unless told otherwise.
        whole = {name: one for name, (one, _) in result["held"].items()}
        assert (whole["by default"], whole["put away"], whole["kept"]) == (
            [True, False],
            [False, False],
            [True, True],
        )


def test_a_copy_of_the_model_in_each_so_many_processes(results, tmp_path):
    assert [result["held"]["by default"][1] for result in results] == [5, 4]
    assert [result["held"]["one copy each"][1] for result in results] == [9, 9]
    expected = train(tmp_path, steps=HALF)
    for result in results:
        torch.testing.assert_close(result["copies"]["steps"], expected["steps"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result["copies"]["state"], expected["state"], rtol=1e-4, atol=1e-5)


def test_the_first_of_the_processes_that_hold_the_same_writes_it(results, folder):
    path = folder / "copies" / f"checkpoint_{HALF}"
    assert not list(path.glob("*.00001.safetensors"))
    saved = load(path)
    expected = results[0]["copies"]["state"]
    assert all(torch.equal(saved.model[name], tensor) for name, tensor in expected.items())
    assert all(state["exp_avg"].count_nonzero() for state in saved.optimizer["state"].values())


def test_another_phase_takes_over_the_rows_that_a_process_holds(results, folder):
    saved = load(folder / "run" / f"checkpoint_{HALF}").optimizer["state"]
    for result in results:
        states, cut, whole_parts = result["carried"]
        assert not {"model", "optimizer"} & set(whole_parts)
        assert cut.keys() == saved.keys() and all(cut.values())
        for index, state in saved.items():
            for key, value in state.items():
                assert torch.equal(states[index][key], value)


def test_every_process_writes_its_pieces_and_one_process_reads_them(results, folder, tmp_path):
    path = newest_valid(folder / "run", pytest.fail)
    assert path is not None
    files = {file.name for file in path.iterdir()}
    assert {"model.safetensors", "model.00001.safetensors", "optimizer.00001.safetensors"} <= files
    parts = load(path)
    state = results[0]["run"]["state"]
    assert all(torch.equal(tensor, parts.model[name]) for name, tensor in state.items())
    alone = Trainer(
        model_dir=tmp_path, model=Net, device="cpu", loggers=[], seed=2, sparsity=SPARSITY, optimizer=adam
    )
    alone.validate([torch.ones(2, 8)], path)
    assert all(torch.equal(tensor, state[name]) for name, tensor in alone.model.state_dict().items())


def test_a_damaged_piece_is_noticed(folder, tmp_path):
    path = newest_valid(folder / "halves", pytest.fail)
    assert path is not None
    file = path / "optimizer.00001.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match=r"optimizer\.00001\.safetensors: is damaged"):
        load(path)
    file.write_bytes(content)


def test_a_process_that_cannot_write_says_so_and_the_checkpoint_before_stays(results, folder):
    (first, no_folder), (second, no_folder_either) = (result["failing"] for result in results)
    assert "process 1 could not write its pieces: No space left on device" in first
    assert "cannot be written: No space left on device" in second
    assert "cannot be written" in no_folder and "cannot be written" in no_folder_either
    path = newest_valid(folder / "failing", pytest.fail)
    assert path is not None and path.name == "checkpoint_1"
    parts = load(path)
    assert parts.model["cut"].tolist() == [[1.0, 1.0]] * 3 and parts.model["tied"] is parts.model["cut"]


def test_a_killed_process_leaves_the_checkpoint_before(tmp_path):
    with pytest.raises(mp.ProcessExitedException):
        start(killed, tmp_path)
    path = newest_valid(tmp_path, pytest.fail)
    assert path is not None and path.name == "checkpoint_1"


def test_what_does_not_go_with_it_is_refused(results):
    assert results[0]["refused"] == results[1]["refused"]
    assert results[0]["refused"] == {
        "compact": (
            "sparsity.compute: compact for first.weight beside parallel.strategy: fsdp2, which cuts dense weights, is "
            "not allowed; give auto or masked, or strategy: ddp (example: compute: auto)"
        ),
        "cpu_offload": (
            "parallel.cpu_offload: true in a process group of gloo alone is not allowed; give false, or join the "
            "processes by a group that sends from the CPU too (example: "
            'torch.distributed.init_process_group("cpu:gloo,cuda:nccl"))'
        ),
        "device": (
            "parallel.strategy: fsdp2 on the CPU with torch 2.6.0 is not allowed; give ddp, or install a newer torch "
            "(example: strategy: ddp)"
        ),
        "optimizer": (
            "optimizer: a SGD is not allowed; give a function of the model that returns the optimizer, as fsdp2 makes "
            "other parameters"
        ),
        "float16": (
            "precision.fp16_type: float16 is not allowed; give another format beside strategy: fsdp2 (example: "
            "fp16_type: bfloat16)"
        ),
        "shard_size": (
            "parallel.shard_size: 3 is not allowed; give a number that divides the 2 processes (example: shard_size: 2)"
        ),
    }


def test_its_keys_belong_to_it():
    with pytest.raises(ConfigError, match=r"parallel.shard_size: beside strategy: ddp is not allowed"):
        read_block(ParallelConfig, {"strategy": "ddp", "shard_size": 2}, "parallel")


def test_blocks_that_share_a_weight_are_left_together():
    model = Net()
    assert blocks_of(model) == list(model.layers)
    model.last.weight = model.layers[0].inner.weight
    assert blocks_of(model) == []
    model = nn.ModuleList([nn.ModuleList([nn.Linear(1, 1)]), nn.ReLU()])
    assert blocks_of(model) == []
