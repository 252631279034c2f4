"""A process that fails, among two: the other ends with it, and the words are its own."""

from __future__ import annotations

import time
from pathlib import Path

import yaml

from forks import rarefy_in

CODE = """
import os

from rarefy.callbacks import Callback
from rarefy.errors import RarefyError


class Fails(Callback):
    def on_train_batch_start(self, trainer, batch, micro_step):
        if os.environ["RANK"] == "1" and trainer.global_step == 5:
            raise RarefyError("the disk of this machine is full")
"""


def write(folder: Path) -> None:
    (folder / "fails.py").write_text(CODE)
    (folder / "a.txt").write_bytes(bytes((7 * place * place) % 256 for place in range(1024)))
    sizes = {
        "vocab_size": 256,
        "max_position_embeddings": 8,
        "hidden_size": 16,
        "num_heads": 2,
        "filter_size": 16,
    }
    init = {
        "seed": 1,
        "device": "cpu",
        "model_dir": "md",
        "model": {"name": "gpt2", "num_hidden_layers": 1, **sizes},
        "optimizer": {"AdamW": {"lr": 0.01}},
        "sparsity": {"algorithm": "rigl", "sparsity": 0.5, "update": {"freq": 3}, "compute": "compact"},
        "parallel": {"strategy": "ddp"},
        "loop": {"max_steps": 8},
        "checkpoint": {"steps": 2},
        "callbacks": [{"./fails.py:Fails": {}}],
    }
    data = {
        "data_processor": "TextCorpusDataProcessor",
        "source": "a.txt",
        "sequence_length": 8,
        "batch_size": 4,
    }
    text = yaml.safe_dump({"trainer": {"init": init, "fit": {"train_dataloader": data}}})
    (folder / "params.yaml").write_text(text)


def test_a_process_that_fails_ends_the_other_with_its_words(tmp_path: Path) -> None:
    write(tmp_path)
    began = time.monotonic()
    code, *words = rarefy_in(tmp_path, "run", "params.yaml", "--nproc", "2").end()
    said = "".join(words)
    assert code == 1, said
    assert "Error (process 1 of 2): the disk of this machine is full" in said
    assert "unexpected" not in said
    assert "Traceback" not in said
    # Of which most is loading torch on a busy machine; a process that waited for another would wait for half an hour.
    assert time.monotonic() - began < 300
