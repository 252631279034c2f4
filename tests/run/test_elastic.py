"""All processes of a run are killed; another number of them goes on by itself, to the end of one that was not.

What they wrote in pieces, `rarefy inspect`, `export` and `report` read in one process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny_run
from rarefy.callbacks import Callback
from rarefy.checkpoint.directory import load

PARAMS = """
trainer:
  init:
    device: cpu
    seed: 1
    model_dir: md
    model: {{name: gpt2, num_hidden_layers: 2, vocab_size: 256, max_position_embeddings: 8, hidden_size: 16,
      num_heads: 2, filter_size: 16, dropout_rate: 0.0, attention_dropout_rate: 0.0}}
    optimizer: {{SGD: {{lr: 0.2, momentum: 0.9}}}}
    sparsity: {{algorithm: set, sparsity: 0.5, update: {{freq: 2}}}}
    parallel: {{strategy: {strategy}}}
    loop: {{max_steps: 8}}
    checkpoint: {{steps: 3}}
    callbacks: [{{"{file}:Killer": {{}}}}]
  fit:
    train_dataloader: {{data_processor: TextCorpusDataProcessor, source: a.txt, sequence_length: 8, batch_size: 4}}
"""


class Killer(Callback):
    """Kills its process after a step, which the environment tells."""

    def on_train_batch_end(self, trainer, metrics):
        if trainer.global_step == int(os.environ["KILL_AT"]):
            trainer.writer.wait()
            torch.distributed.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def child(folder: str, environment: dict[str, str]) -> None:
    from rarefy.cli.app import app

    torch.set_num_threads(1)
    os.environ |= environment
    os.chdir(folder)
    with open("said.txt", "a") as said, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        app(["run", "params.yaml"])


def run(folder: Path, count: int, kill_at: int = 0) -> list[int | None]:
    """The exit codes of so many processes, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    context = multiprocessing.get_context("forkserver")
    # One process imports torch, and the others are copies of it.
    context.set_forkserver_preload(["torch", "rarefy.cli.app", "torch.distributed.fsdp"])
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count)}
    places = [{**address, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    found = [
        context.Process(
            target=child, args=(str(folder), {**(place if count > 1 else {}), "KILL_AT": str(kill_at)})
        )
        for place in places
    ]
    for one in found:
        one.start()
    for one in found:
        one.join(240)
        if one.exitcode is None:
            one.kill()
    return [one.exitcode for one in found]


def taken(folder: Path, *arguments: str) -> list[str]:
    """The words that a command says, without the folder."""
    result = tiny_run.rarefy(*arguments)
    assert result.exit_code == 0, result.output
    return result.output.replace(str(folder), "").split()


def made(folder: Path, strategy: str) -> Path:
    folder.mkdir()
    (folder / "params.yaml").write_text(PARAMS.format(strategy=strategy, file=__file__))
    (folder / "a.txt").write_bytes(bytes((7 * place * place + place // 5) % 256 for place in range(2048)))
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process that nobody killed."""
    folder = made(tmp_path_factory.mktemp("alone") / "run", "ddp")
    assert run(folder, 1) == [0], (folder / "said.txt").read_text()
    return folder


@pytest.mark.parametrize(("strategy", "before", "after"), [("fsdp2", 2, 3), ("fsdp2", 2, 1), ("ddp", 3, 2)])
def test_another_number_of_processes_goes_on(
    tmp_path: Path, whole: Path, strategy: str, before: int, after: int
) -> None:
    killed = made(tmp_path / "killed", strategy)
    assert run(killed, before, kill_at=5) == [-signal.SIGKILL] * before
    assert [path.name for path in (killed / "md").glob("checkpoint_*")] == ["checkpoint_3"]
    assert run(killed, after) == [0] * after, (killed / "said.txt").read_text()
    assert "continuing from" in (killed / "said.txt").read_text()
    expected, found = (load(folder / "md" / "checkpoint_8").model for folder in (whole, killed))
    assert expected.keys() == found.keys()
    for name, one in expected.items():
        if name.endswith("_mask"):
            assert torch.equal(found[name], one), name
        else:
            torch.testing.assert_close(found[name], one, rtol=1e-3, atol=1e-4)
    if (strategy, after) != ("fsdp2", 3):
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
