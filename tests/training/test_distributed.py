"""Two processes train the model that one process with twice the micro-batches trains."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from rarefy.training import distributed

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from rarefy.training.trainer import Trainer

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, batch):
        return (self.second(self.first(batch).relu()) - batch).square().mean()

folder, rank = sys.argv[1], int(os.environ.get("RANK", "-1"))
every = list(torch.randn(24, 4, 8, generator=torch.Generator().manual_seed(0)))
data = every if rank < 0 else every[rank::2]
trainer = Trainer(
    model_dir=folder, model=Net, device="cpu", loggers=[], seed=1,
    sparsity={"algorithm": "rigl", "sparsity": 0.5, "update": {"freq": 3}},
    optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    loop={"num_steps": 6, "grad_accum_steps": 4 if rank < 0 else 2},
)
trainer.fit(data, [every[0]])
torch.save(trainer.model.state_dict(), f"{folder}/result{rank}.pt")
if rank >= 0:
    dist.destroy_process_group()
"""


def start(folder: Path, port: str, **environment: str) -> subprocess.Popen:
    script = folder / "script.py"
    script.write_text(SCRIPT)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, str(script), str(folder)],
        env={**os.environ, **address, **environment},
        stderr=subprocess.PIPE,
    )


def free_port() -> str:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    port = free_port()
    alone = tmp_path / "alone"
    alone.mkdir()
    runs = [start(tmp_path, port, RANK=str(rank), WORLD_SIZE="2") for rank in range(2)]
    for one in (*runs, start(alone, port)):
        _, errors = one.communicate(timeout=120)
        assert one.returncode == 0, errors.decode()

    first, second = (torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2))
    expected = torch.load(alone / "result-1.pt", weights_only=True)
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor)
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_6"]


def test_one_process_needs_no_group() -> None:
    model = torch.nn.Linear(1, 1)
    assert distributed.wrapped(model) is model
    assert distributed.join_processes(torch.device("cpu")) == torch.device("cpu")
    assert distributed.is_first() and distributed.highest(7) == 7
    distributed.wait_for_all()
