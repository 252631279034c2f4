"""Numbers that were written as text."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rarefy.config import configure
from rarefy.errors import ConfigError
from rarefy.optim.optimizers import build_optimizer
from rarefy.run.schema import parse
from rarefy.schedules import parse_schedule
from rarefy.trainer.plan import LoopConfig
from rarefy.validation import read_block
from rarefy.validation.numerals import as_number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1e-3", 1e-3),
        ("100", 100),
        (" -2.5 ", -2.5),
        (".5", 0.5),
        ("75%", None),
        ("1_000", None),
        ("nan", None),
        ("", None),
        ("9" * 5000, None),
        (5, None),
        (None, None),
    ],
)
def test_what_spells_a_number(text: object, number: object) -> None:
    assert as_number(text) == number
    assert type(as_number(text)) is type(number)


def content(**init: Any) -> dict[str, Any]:
    return {"trainer": {"init": {"model": {"name": "gpt2"}, **init}}}


def test_a_quoted_number_of_the_file_is_read_with_a_note() -> None:
    text = {"loop": {"max_steps": "10"}, "checkpoint": {"steps": "5"}}
    with pytest.warns(UserWarning) as caught:
        [config] = parse(content(**text))
    assert config.init.loop == LoopConfig(max_steps=10)
    assert config.init.checkpoint is not None and config.init.checkpoint.steps == 5
    assert [str(one.message) for one in caught] == [
        "trainer.init.loop.max_steps: '10' is text and is read as the number 10; write it without quotes",
        "trainer.init.checkpoint.steps: '5' is text and is read as the number 5; write it without quotes",
    ]


def test_what_does_not_fit_as_a_number_is_refused_as_one() -> None:
    with (
        pytest.warns(UserWarning, match="is read as the number 1.5"),
        pytest.raises(ConfigError, match=r"max_steps: 1\.5 is not allowed"),
    ):
        parse(content(loop={"max_steps": "1.5"}))


def test_blocks_schedules_optimizers_and_seeds_read_it_too() -> None:
    with pytest.warns(UserWarning, match=r"loop\.num_steps: '5' is text"):
        assert read_block(LoopConfig, {"num_steps": "5"}, "loop").num_steps == 5
    with pytest.warns(UserWarning, match="'0.9' is text and is read as the number 0.9"):
        assert parse_schedule("0.9", path="s")(0) == 0.9
    with pytest.warns(UserWarning, match="half_period: '10' is text"):
        assert parse_schedule({"type": "cosine", "init": 0.3, "half_period": "10"})(10) == 0.0
    with pytest.warns(UserWarning, match="sparsity: '0.9' is text"):
        assert configure("0.9").target_at(0, 0) == 0.9  # type: ignore[union-attr]
    with pytest.warns(UserWarning, match="seed: '3' is text"):
        assert configure({"sparsity": 0.9, "seed": "3"}).seed == 3  # type: ignore[union-attr]
    with pytest.warns(UserWarning) as caught:
        options = {"lr": "1e-3", "betas": ["0.8", 0.9], "weight_decay": 0.1}
        optimizer = build_optimizer({"AdamW": options}, torch.nn.Linear(2, 2))
    assert optimizer.defaults["lr"] == 1e-3 and optimizer.defaults["betas"] == (0.8, 0.9)
    assert [str(one.message).partition(":")[0] for one in caught] == [
        "optimizer.AdamW.lr",
        "optimizer.AdamW.betas[0]",
    ]


@pytest.mark.parametrize(
    ("block", "where"),
    [
        ("90%", "sparsity"),
        ({"sparsity": "90%"}, "sparsity.sparsity"),
        (
            {
                "algorithm": "gmp",
                "sparsity": {"type": "polynomial", "init": 0, "final": "90%", "start": 0, "stop": 9},
            },
            "sparsity.sparsity.final",
        ),
    ],
)
def test_a_share_in_percent_has_a_hint(block: object, where: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{where}: '90%' is not allowed; .*; did you mean 0\.9\?"):
        configure(block)


def test_a_share_in_a_block_and_in_an_optimizer() -> None:
    with pytest.raises(ConfigError, match=r"max_gradient_norm: '50%' .*; did you mean 0\.5\?"):
        parse(content(precision={"max_gradient_norm": "50%"}))
    with pytest.raises(
        ConfigError, match=r"AdamW\.lr: '1%' is not allowed; give a number; did you mean 0\.01\?"
    ):
        build_optimizer({"AdamW": {"lr": "1%"}}, torch.nn.Linear(2, 2))
