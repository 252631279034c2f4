"""What algorithms, summaries and trainers show of themselves, in a line and in a notebook."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from rarefy.algorithms.summary import html_table, one_line
from rarefy.errors import ConfigError


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))


def test_a_line_and_a_table() -> None:
    assert one_line("A", {"b": 1, "c": None}) == "A(b=1, c)"
    assert html_table(["", ""], [["<", "2"]], "t") == (
        "<table><caption>t</caption><tbody><tr><td>&lt;</td><td>2</td></tr></tbody></table>"
    )


def test_an_algorithm_is_one_short_line_and_its_table() -> None:
    sparsity = rarefy.RigL(0.75, update={"freq": 10})
    assert repr(sparsity) == "RigL(sparsity=0.75, not applied)"
    assert sparsity._repr_html_() == "<code>RigL(sparsity=0.75, not applied)</code>"
    sparsity.apply(model())
    assert repr(sparsity) == "RigL(sparsity=0.75, weights=2, actual=0.7500, step=0)"
    html = sparsity._repr_html_()
    assert html == rarefy.summary(sparsity)._repr_html_()
    assert re.findall(r"<td>(\d\.weight|all)</td>", html) == ["0.weight", "1.weight", "all"]


def test_a_group_names_its_members_and_a_schedule_itself() -> None:
    cubic = {"type": "polynomial", "init": 0.0, "final": 0.9, "start": 0, "stop": 50}
    group = rarefy.configure(
        [{"sparsity": 0.5, "param_filter": "0.weight"}, {"algorithm": "gmp", "sparsity": cubic}]
    )
    assert repr(group) == (
        "Group(Static(sparsity=0.5, not applied), GMP(sparsity="
        "Polynomial(init=0.0, final=0.9, start=0, stop=50, power=3.0), not applied))"
    )
    group.apply(model())
    assert group._repr_html_().count("<tr>") == 4


def test_a_summary_is_one_line() -> None:
    sparsity = rarefy.Static(0.75)
    sparsity.apply(model())
    assert repr(rarefy.summary(sparsity)) == "Summary(weights=2, actual=0.7500)"


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 4)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.linear(batch).square().mean()


def test_a_trainer_is_one_line_and_a_table(tmp_path: Path) -> None:
    trainer = rarefy.Trainer(
        model_dir=tmp_path / "<run>",
        model=Square(),
        device="cpu",
        sparsity=0.5,
        loop={"num_steps": 2},
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        loggers=[],
    )
    trainer.fit([torch.ones(4, 8)])
    assert repr(trainer) == f"Trainer(Square, step 2 of 2, model_dir='{tmp_path}/<run>')"
    html = trainer._repr_html_()
    assert "&lt;run&gt;" in html and "<td>step</td><td>2 of 2</td>" in html
    assert "Static(sparsity=0.5, weights=1" in html and "<td>loss</td>" in html


@pytest.mark.parametrize("kind", [rarefy.RigL, rarefy.SET, rarefy.GMP])
def test_a_step_key_beside_update_is_told_where_it_belongs(kind: type) -> None:
    wanted = rf"freq=10, stop=75 for {kind.__name__} is not allowed; give it inside update "
    with pytest.raises(ConfigError, match=wanted + r"\(example: update=\{'freq': 10, 'stop': 75\}\)"):
        kind(0.9, freq=10, stop=75)


def test_a_constructor_of_ones_own_may_take_such_a_name() -> None:
    class Late(rarefy.RigL):
        def __init__(self, sparsity: float, *, start: int) -> None:
            super().__init__(sparsity)
            self.late = start

    assert Late(0.9, start=5).late == 5
    with pytest.raises(ConfigError, match="freq=5 for Late"):
        Late(0.9, start=5, freq=5)  # type: ignore[call-arg]
