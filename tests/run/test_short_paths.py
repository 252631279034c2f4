"""`--set` with the end of a path."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest

from rarefy.errors import ConfigError
from rarefy.run.short_paths import whole_assignment

DATA = {"data_processor": "TextCorpusDataProcessor", "batch_size": 4}
FILE: dict[str, Any] = {
    "trainer": {
        "init": {
            "model": {"name": "gpt2"},
            "optimizer": {"AdamW": {"lr": 0.1}},
            "sparsity": {"algorithm": "rigl", "sparsity": 0.9, "update": {"freq": 10}},
        },
        "fit": {"train_dataloader": DATA, "val_dataloader": DATA},
    }
}


@pytest.mark.parametrize(
    ("given", "whole"),
    [
        ("sparsity=0.5", "trainer.init.sparsity.sparsity=0.5"),
        ("lr=1e-3", "trainer.init.optimizer.AdamW.lr=1e-3"),
        ("AdamW.lr=1e-3", "trainer.init.optimizer.AdamW.lr=1e-3"),
        ("update.freq=5", "trainer.init.sparsity.update.freq=5"),
        ("max_steps=5", "trainer.init.loop.max_steps=5"),
        ("train_dataloader.batch_size=2", "trainer.fit.train_dataloader.batch_size=2"),
        ("seed=3", "trainer.init.seed=3"),
        ("trainer.init.seed=3", "trainer.init.seed=3"),
        ("no.such.key=3", "no.such.key=3"),
        ("seed", "seed"),
    ],
)
def test_the_one_key_that_is_meant(given: str, whole: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "rarefy")
    assert whole_assignment(FILE, given) == whole
    assert [record.getMessage() for record in caplog.records] == (
        [] if given == whole else [f"--set {given.partition('=')[0]} is {whole.partition('=')[0]}"]
    )


@pytest.mark.parametrize("block", [None, 0.9])
def test_a_block_that_is_a_number_or_not_there_is_meant_itself(block: object) -> None:
    content = copy.deepcopy(FILE)
    content["trainer"]["init"]["sparsity"] = block
    assert whole_assignment(content, "sparsity=0.5") == "trainer.init.sparsity=0.5"


def test_several_keys_are_listed() -> None:
    where = "trainer.fit.train_dataloader.batch_size, trainer.fit.val_dataloader.batch_size"
    with pytest.raises(
        ConfigError, match=rf"--set batch_size: a key that is there 2 times .* one of {where} "
    ):
        whole_assignment(FILE, "batch_size=2")
    several = {"trainer": [{"trainer": FILE["trainer"]}] * 4}
    with pytest.raises(ConfigError, match=r"there 4 times .* one of trainer\[0\]\.trainer\.init\.seed, "):
        whole_assignment(several, "seed=2")


def test_an_unknown_key_has_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"--set max_stps: .* \(did you mean max_steps\?\)"):
        whole_assignment(FILE, "max_stps=5")
    with pytest.raises(ConfigError, match="its whole path is always right"):
        whole_assignment(FILE, "qqqqqqqq=5")
