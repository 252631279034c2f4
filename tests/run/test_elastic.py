"""All processes of a run are killed; another number of them goes on by itself, to the end of one that was not.

What they wrote in pieces, `rarefy inspect`, `export` and `report` read in one process.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from process_runs import STEPS, made, run, samples
from ranks import NEEDS_FULLY_SHARD
from rarefy.checkpoint.directory import load

pytestmark = NEEDS_FULLY_SHARD


def taken(folder: Path, *arguments: str) -> list[str]:
    """The words that a command says, without the folder."""
    result = tiny_run.rarefy(*arguments)
    assert result.exit_code == 0, result.output
    return result.output.replace(str(folder), "").split()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nobody killed."""
    folder = made(tmp_path_factory.mktemp("alone") / "run", "ddp")
    assert run(folder, 1) == [0], (folder / "said.txt").read_text()
    assert all(len(step) == 4 for step in samples(folder))
    return folder


@pytest.mark.parametrize(
    ("strategy", "saves", "counts"),
    [("fsdp2", 3, (2, 3)), ("fsdp2", 2, (4, 2, 1, 2)), ("ddp", 2, (4, 2, 1, 2))],
    ids=str,
)
def test_another_number_of_processes_goes_on(
    tmp_path: Path, whole: Path, strategy: str, saves: int, counts: tuple[int, ...]
) -> None:
    killed = made(tmp_path / "killed", strategy, saves)
    # One step is lost each time.
    for number, count in enumerate(counts[:-1], 1):
        kill_at = str(number * saves + 1)
        codes = run(killed, count, lambda _, kill_at=kill_at: {"KILL_AFTER_STEP": kill_at})
        assert codes == [-signal.SIGKILL] * count, (killed / "said.txt").read_text()
    assert {path.name for path in (killed / "md").glob("checkpoint_*")} <= {
        f"checkpoint_{number * saves}" for number in range(1, len(counts))
    }
    assert run(killed, counts[-1]) == [0] * counts[-1], (killed / "said.txt").read_text()
    assert (killed / "said.txt").read_text().count("continuing from") >= len(counts) - 1
    # No sample twice in a step, none from another step.
    assert samples(killed) == samples(whole)
    expected, found = (load(folder / "md" / f"checkpoint_{STEPS}").model for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        if name.endswith("_mask"):
            assert torch.equal(found[name], one), name
        else:
            torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-4)
    if counts != (2, 3):
        return
    assert len(list((killed / "md" / "checkpoint_8").glob("model*.safetensors"))) == 3
    assert taken(killed, "inspect", f"{killed}/md") == taken(whole, "inspect", f"{whole}/md")
    dense = []
    for folder in (killed, whole):
        taken(
            folder, "export", f"{folder}/md", "--to", "safetensors", f"{tmp_path}/{folder.name}.safetensors"
        )
        dense.append(load_file(tmp_path / f"{folder.name}.safetensors"))
    assert dense[0].keys() == dense[1].keys()
    for name, one in dense[1].items():
        torch.testing.assert_close(dense[0][name], one, rtol=1e-3, atol=1e-4)
        assert torch.equal(dense[0][name] == 0, one == 0)
    taken(killed, "report", f"{killed}/md", "-o", f"{tmp_path}/report.html")
    assert 'id="ranks"' in (tmp_path / "report.html").read_text()
