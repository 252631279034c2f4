"""Writes docs/matrix.md: which method goes with which pattern, distribution and storage.

Each combination is built on a tiny model and takes two steps, each with an update; what is refused is listed with the
reason that the library gives. So the page says what the installed version does.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import Parameter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.algorithms.options import options_of
from rarefy.distributions import DISTRIBUTIONS
from rarefy.errors import ConfigError, RarefyError
from rarefy.methods.registry import ALGORITHMS
from rarefy.patterns import parse_pattern

PAGE = Path(__file__).resolve().parents[1] / "matrix.md"
# As they are written in a file; blocks that compact storage keeps whole, and one where a single connection is left.
PATTERNS: Mapping[str, Any] = {
    "unstructured": "unstructured",
    "{n: 2, m: 4}": {"n": 2, "m": 4},
    "{n: 1, m: 4}": {"n": 1, "m": 4},
    "{n: 2, m: 4, transposable: true}": {"n": 2, "m": 4, "transposable": True},
    "fan_in": "fan_in",
    "fan_out": "fan_out",
    "diagonal": "diagonal",
    "{block: [8, 8]}": {"block": [8, 8]},
}
STORAGES = ("masked", "compact")
STEPS = 2
WIDTH = 16


class Combination(NamedTuple):
    """One cell of the matrix.

    Args:
        method: its registered name.
        pattern: a key of `PATTERNS`.
        distribution: its name.
        compute: the storage that is asked for.
    """

    method: str
    pattern: str
    distribution: str
    compute: str


class Outcome(NamedTuple):
    """What became of a combination.

    Args:
        form: the storage of the weights; empty where it was refused.
        reason: why it was refused; empty where it works.
    """

    form: str = ""
    reason: str = ""


def combinations() -> Iterator[Combination]:
    """All of them."""
    for facts in itertools.product(ALGORITHMS, PATTERNS, DISTRIBUTIONS, STORAGES):
        yield Combination(*facts)


def tried(one: Combination) -> Outcome:
    """Builds a combination, trains it for some steps, and looks whether the mask holds."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False))
    try:
        algorithm = built(one)
        algorithm.apply(model)
        train(algorithm, model)
    except ConfigError as error:
        # One reason for all methods that share it.
        allowed = error.allowed.replace(f"for {one.method}", "for this method")
        return Outcome(reason=f"`{error.path}`: {allowed}")
    except RarefyError as error:
        return Outcome(reason=str(error))
    return Outcome(form=checked(algorithm))


def built(one: Combination) -> SparsityAlgorithm:
    """The algorithm, with a constant sparsity, or with a schedule where its method wants one."""
    kind = ALGORITHMS[one.method]
    pattern = PATTERNS[one.pattern]
    options = options_of(kind)
    chosen: dict[str, Any] = {
        name: 0.9 for name in options if name != "sparsity" and _is_required(options[name])
    }
    chosen |= {"pattern": pattern, "distribution": one.distribution, "compute": one.compute, "seed": 0}
    if "update" in options:
        chosen["update"] = {"steps": list(range(STEPS + 1))}
    highest = parse_pattern(pattern, None, None).structure.highest_sparsity
    sparsity = highest if highest < 1.0 else 0.5
    try:
        return kind(sparsity, **chosen)
    except ConfigError as error:
        if error.path != "sparsity":
            raise
    return kind([0.25, sparsity, sparsity], **chosen)


def _is_required(option: Any) -> bool:
    return option.default is Parameter.empty


def train(algorithm: SparsityAlgorithm, model: nn.Module) -> None:
    """Takes steps, each of them an update step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    algorithm.apply(optimizer)
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()


def checked(algorithm: SparsityAlgorithm) -> str:
    """The storage of the weights, if their masks and zeros are as they should be.

    Raises:
        AssertionError: they are not.
    """
    assert algorithm.step == STEPS, f"{algorithm} took {algorithm.step} steps"
    shares = algorithm.shares(algorithm.target_sparsity)
    for name, parameter in algorithm.parameters.items():
        mask = parameter.mask
        pattern = parameter.pattern
        assert pattern.structure.holds(mask, shares[name]), f"{algorithm} does not obey {pattern}"
        assert int(mask.sum()) == pattern.kept(mask.shape, shares[name]), f"{algorithm} has another count"
        assert not parameter.true_weight()[~mask].any(), f"{algorithm} has inactive weights"
    [form] = {parameter.storage.form for parameter in algorithm.parameters.values()}
    return form


def table(outcomes: Mapping[Combination, Outcome]) -> tuple[str, list[str]]:
    """Methods × patterns, in each cell the distributions that work, and the reasons why others do not."""
    reasons: list[str] = []
    lines = [
        f"| | {' | '.join(f'`{pattern}`' for pattern in PATTERNS)} |",
        "|---" * (len(PATTERNS) + 1) + "|",
    ]
    for method in ALGORITHMS:
        cells = [cell(of(outcomes, method=method, pattern=pattern), reasons) for pattern in PATTERNS]
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines), reasons


def cell(some: Mapping[Combination, Outcome], reasons: list[str]) -> str:
    """Which distributions work in both storages; `reasons` grows by those that are new."""
    refused = {one: outcome.reason for one, outcome in some.items() if outcome.reason}
    notes = []
    for reason in dict.fromkeys(refused.values()):
        if reason not in reasons:
            reasons.append(reason)
        notes.append(f"({reasons.index(reason) + 1})")
    works = [name for name in DISTRIBUTIONS if name not in {one.distribution for one in refused}]
    shown = "all" if len(works) == len(DISTRIBUTIONS) else ", ".join(works) or "–"
    return " ".join([shown, *notes])


def of(outcomes: Mapping[Combination, Outcome], **facts: str) -> dict[Combination, Outcome]:
    """The outcomes of some combinations."""
    wanted = facts.items()
    return {
        one: outcome
        for one, outcome in outcomes.items()
        if all(getattr(one, key) == value for key, value in wanted)
    }


def storage_table(outcomes: Mapping[Combination, Outcome]) -> str:
    """What each pattern is stored as."""
    lines = [f"| pattern | {' | '.join(f'`compute: {name}`' for name in STORAGES)} |", "|---" * 3 + "|"]
    for pattern in PATTERNS:
        forms = [_forms(of(outcomes, pattern=pattern, compute=name).values()) for name in STORAGES]
        lines.append(f"| `{pattern}` | {' | '.join(forms)} |")
    return "\n".join(lines)


def _forms(outcomes: Iterable[Outcome]) -> str:
    return ", ".join(dict.fromkeys(one.form for one in outcomes if one.form)) or "–"


def page(outcomes: Mapping[Combination, Outcome]) -> str:
    """The whole page."""
    combined, reasons = table(outcomes)
    working = sum(not outcome.reason for outcome in outcomes.values())
    return (
        "\n\n".join(
            [
                INTRODUCTION,
                counted(len(outcomes), working),
                combined,
                *numbered(reasons),
                STORED,
                storage_table(outcomes),
                REST,
            ]
        )
        + "\n"
    )


def counted(total: int, working: int) -> str:
    """How many there are."""
    distributions = ", ".join(f"`{name}`" for name in DISTRIBUTIONS)
    sizes = f"{len(ALGORITHMS)} methods, {len(PATTERNS)} patterns, {len(DISTRIBUTIONS)} distributions ({distributions})"
    return (
        f"{working} of {total} combinations of {sizes} and two storages work; the others are refused when the file is read,\n"
        "with the reason below. A cell names the distributions that go with its method and pattern, in both storages."
    )


def numbered(reasons: Sequence[str]) -> list[str]:
    """The reasons, as a list."""
    return (
        ["\n".join(f"- ({number}) {reason}" for number, reason in enumerate(reasons, 1))] if reasons else []
    )


INTRODUCTION = """# What goes with what

Method, pattern, distribution and storage are chosen independently of each other. This page is made by `docs/scripts/matrix.py`, which builds each combination on a tiny model
and lets it take two steps with an update each: the mask has to obey its pattern with the exact count, and inactive weights have to be zeros."""
STORED = """## Storage

The storage of a linear layer on the CPU: `block` keeps whole blocks, `compact` the active connections, in rows."""
REST = """What compact storage cannot hold (convolutions, tied weights, other devices, several processes) is masked under `compute: auto`, whatever the pattern, and refused under
`compute: compact`. Schedules are independent of all of it; some methods want a constant sparsity, others a schedule, which [their sections](methods.md) say. Balanced groups go with each
pattern that divides a group."""


def matrix_page() -> str:
    """The page of the installed version."""
    return page({one: tried(one) for one in combinations()})


if __name__ == "__main__":
    PAGE.write_text(matrix_page(), encoding="utf-8")
