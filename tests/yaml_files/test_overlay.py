"""`--set`: single values of a configuration."""

from __future__ import annotations

from typing import Any

import pytest

from rarefy.errors import ConfigError
from rarefy.yaml_files.overlay import overlay

CONFIG: dict[str, Any] = {
    "trainer": {
        "init": {
            "optimizer": {"AdamW": {"lr": 0.1}, "torch.optim:SGD": {"lr": 0.2}},
            "sparsity": [{"param_filter": {"*proj_[qkv]*.weight": {"balance_out_groups": 4}}}],
            "seed": 1,
        }
    }
}


@pytest.mark.parametrize(
    ("assignment", "keys", "value"),
    [
        ("trainer.init.optimizer.AdamW.lr=1e-3", ["optimizer", "AdamW", "lr"], 1e-3),
        ("trainer.init.optimizer.torch.optim:SGD.lr=5", ["optimizer", "torch.optim:SGD", "lr"], 5),
        ("trainer.init.sparsity[0].sparsity={type: linear}", ["sparsity", 0, "sparsity"], {"type": "linear"}),
        ("trainer.init.sparsity.0=null", ["sparsity", 0], None),
        (
            "trainer.init.sparsity[0].param_filter.*proj_[qkv]*.weight.balance_out_groups=2",
            ["sparsity", 0, "param_filter", "*proj_[qkv]*.weight", "balance_out_groups"],
            2,
        ),
        ("trainer.init.model_dir=a=b", ["model_dir"], "a=b"),
        ("trainer.init.loop.num_steps=5", ["loop", "num_steps"], 5),
    ],
)
def test_assigns(assignment: str, keys: list[Any], value: object) -> None:
    here: Any = overlay(CONFIG, [assignment], blocks=["loop"])["trainer"]["init"]
    for key in keys:
        here = here[key]
    assert here == value


def test_the_given_config_stays() -> None:
    overlay(CONFIG, ["trainer.init.optimizer.AdamW.lr=5"])
    assert CONFIG["trainer"]["init"]["optimizer"]["AdamW"]["lr"] == 0.1


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("trainer.init.seed", "--set: trainer.init.seed is not allowed; give key.path=value"),
        ("=5", "--set: =5 is not allowed"),
        ("", "--set: nothing is not allowed"),
        ("trainer.init.optimizer.adamw.lr=1", "--set trainer.init.optimizer: `adamw` .*did you mean AdamW"),
        ("trianer.init.seed=1", "--set: `trianer` .*did you mean trainer"),
        ("trainer.init.lop.num_steps=1", "--set trainer.init: `lop` .*did you mean loop"),
        ("trainer.init.seed.x=1", "--set trainer.init.seed: `x` below 1 "),
        (r"trainer.init.sparsity[1].x=1", r"--set trainer.init.sparsity: `\[1\].x` .* an index from 0 to 0"),
        ("trainer.init.sparsity.x=1", r"--set trainer.init.sparsity: `x` .* an index from 0 to 0"),
        ("trainer..seed=1", "--set trainer: `.seed` .*one dot"),
    ],
)
def test_paths_that_do_not_exist(assignment: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        overlay(CONFIG, [assignment], blocks=["loop"])


def test_empty_list() -> None:
    with pytest.raises(ConfigError, match="no index, the list is empty"):
        overlay({"a": []}, ["a[0]=1"])
