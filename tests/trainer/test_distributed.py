"""Two processes train the model that one process with twice the micro-batches trains."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import tiny_run
from forks import Script
from rarefy import distributed
from rarefy.report.run_data import read_run
from rarefy.report.sections import sections_of

SCRIPT = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from rarefy.trainer.trainer import Trainer

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

# Runs the command line and notes which files of the model directory this process opened for writing.
RECORDED_RUN = """
import os, sys
from pathlib import Path

params, written = Path(sys.argv[1]), set()
out = str(params.with_name("out"))

def record(event, arguments):
    if event == "open" and not isinstance(arguments[0], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR):
        path = os.fsdecode(arguments[0])
        written.update([path] if path.startswith(out) else [])

sys.addaudithook(record)
from rarefy.cli import main
sys.argv = ["rarefy", "run", str(params)]
try:
    main()
finally:
    params.with_name("written" + os.environ["RANK"]).write_text("\\n".join(written))
"""


def start(code: str, argument: Path, folder: Path, port: str, **environment: str) -> Script:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "COLUMNS": "200"}
    return Script(code, str(argument), folder=folder, environment={**address, **environment})


def free_port() -> str:
    import socket

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return str(one.getsockname()[1])


def test_two_processes_agree_with_one(tmp_path: Path) -> None:
    port = free_port()
    alone = tmp_path / "alone"
    alone.mkdir()
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    runs = [start(SCRIPT, tmp_path, tmp_path, port, **rank) for rank in ranks]
    for one in (*runs, start(SCRIPT, alone, alone, port)):
        code, _, errors = one.end(timeout=120)
        assert code == 0, errors

    first, second = (torch.load(tmp_path / f"result{rank}.pt", weights_only=True) for rank in range(2))
    expected = torch.load(alone / "result-1.pt", weights_only=True)
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], tensor)
    assert [path.name for path in tmp_path.glob("checkpoint_*")] == ["checkpoint_6"]


def read_lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_only_the_first_process_logs_and_prints(tmp_path: Path) -> None:
    params = tiny_run.write(tmp_path, tiny_run.configuration(tmp_path, loggers=[{"CSVLogger": {}}]))
    port = free_port()
    ranks = [{"RANK": str(rank), "WORLD_SIZE": "2"} for rank in range(2)]
    runs = [start(RECORDED_RUN, params, tmp_path, port, **rank) for rank in ranks]
    (code, said, complaints), other = [one.end(timeout=120) for one in runs]
    assert code == 0, complaints
    assert other == (0, "", "")
    for words in ("Plan", "step 6/6", "steps per second"):
        assert said.count(words) == 1
    written = (tmp_path / "written0").read_text()
    assert all(name in written for name in ("metrics.csv", "tfevents", "run.json", "MANIFEST.json"))
    # The others write nothing but files of their own.
    own = {Path(path).relative_to(tmp_path / "out").as_posix() for path in read_lines(tmp_path / "written1")}
    assert own == {"ranks/rank_1.log", "ranks/.tmp-rank_1.csv"}
    run = read_run(tmp_path / "out", pytest.fail)
    names = {"samples_per_second", "communication/seconds", "communication/bytes", "communication/share"}
    assert run.ranks.keys() == {0, 1} and all(own.keys() == names for own in run.ranks.values())
    assert names <= run.metrics.keys()
    assert run.metrics["communication/bytes"].last == run.ranks[1]["communication/bytes"].last > 0
    for own in run.ranks.values():
        assert 0 < own["communication/share"].last < 1
    [section] = [one for one in sections_of(run) if one.key == "ranks"]
    assert [row[0] for row in section.tables[0].rows] == ["0", "1"]


def test_one_process_needs_no_group() -> None:
    model = torch.nn.Linear(1, 1)
    assert distributed.Parallel(distributed.ParallelConfig()).wrapped(model) is model
    assert distributed.join_processes(torch.device("cpu")) == torch.device("cpu")
    assert distributed.is_first() and distributed.highest_of_all(7) == 7
    distributed.wait_for_all()


def test_a_group_of_one_process_writes_whatever_its_launcher_calls_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    assert not distributed.is_first()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    try:
        assert distributed.is_first()
    finally:
        dist.destroy_process_group()
