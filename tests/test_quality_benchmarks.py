"""The harness of benchmarks/quality: runs that were cut short go on, averages are right, every method has its line."""

from __future__ import annotations

import datetime
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from quality import equal_flops, fine_tuning, records, structure, structure_times, table, training, transfer
from quality.equal_time import Model
from quality.table import Scale, Table, write
from quality.tasks import TASKS, ByteText, Classification, Examples, wide_mlp
from quality.variants import VARIANTS
from torch import Tensor, nn

from rarefy.methods.registry import ALGORITHMS


def build(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 2))


def tiny() -> Classification:
    """A task of its own, with data that need no package."""
    x = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    examples = Examples(x[:40], (x[:40, 0] > 0).long(), x[40:], (x[40:, 0] > 0).long())
    return Classification("tiny", lambda: examples, build, width=16, steps=40, batch_size=8)


def counted(seeds: list[int]) -> Iterator[records.Row]:
    return iter([{"name": "a", "seed": seed} for seed in seeds])


def test_a_table_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    ran: list[int] = []

    def measure(cell: records.Row) -> records.Row:
        ran.append(cell["seed"])
        return {"score": cell["seed"] / 3}

    records.complete(path, counted([0, 1]), measure)
    rows = records.complete(path, counted([0, 1, 2]), measure)
    assert ran == [0, 1, 2]
    assert [row["score"] for row in rows] == [0.0, 0.333333, 0.666667]
    assert records.read(path) == rows


@pytest.mark.parametrize("has_head", [False, True])
def test_processes_share_the_runs_of_a_table(has_head: bool, tmp_path: Path) -> None:
    path = tmp_path / "table.csv"

    def measure(cell: records.Row) -> records.Row:
        return {"score": 2.0 * cell["seed"], "process": os.getpid()}

    if has_head:
        records.complete(path, counted([3]), measure)
    rows = records.complete(path, counted(list(range(7))), measure, jobs=2)
    assert [row["score"] for row in rows] == [2.0 * seed for seed in range(7)]
    assert len({row["process"] for row in rows} - {os.getpid()}) == 2
    assert len(path.read_text().splitlines()) == 8


def test_a_process_that_fails_ends_the_table(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def measure(cell: records.Row) -> records.Row:
        return {"score": 1 / (cell["seed"] - 2)}

    with pytest.raises(RuntimeError, match="1 of 2 processes failed"):
        records.complete(tmp_path / "table.csv", counted([0, 1, 2, 3]), measure, jobs=2)
    assert "ZeroDivisionError" in capfd.readouterr().err


def test_a_setting_of_many_digits_is_not_run_again(tmp_path: Path) -> None:
    cells = [{"lr": 2.0**-11, "seed": 0}]
    for score in (1.0, 2.0):
        rows = records.complete(tmp_path / "table.csv", cells, lambda cell, score=score: {"score": score})
    assert [row["score"] for row in rows] == [1.0]


def test_means_and_standard_errors() -> None:
    rows = [
        {"name": name, "seed": seed, "score": score}
        for name, seed, score in (("a", 0, 1.0), ("a", 1, 3.0), ("b", 0, 5.0))
    ]
    first, second = records.summarised(rows, ["score"])
    assert first == {"name": "a", "runs": 2, "score": 2.0, "score_error": 1.0}
    assert second == {"name": "b", "runs": 1, "score": 5.0, "score_error": 0.0}


def test_a_table_writes_its_averages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "HERE", tmp_path)
    threads = torch.get_num_threads()

    def run(scale: Scale) -> None:
        records.complete(
            scale.folder / "one.csv", counted([0, 1]), lambda cell: {"score": float(cell["seed"])}
        )

    path = write(Table("one", run, ("score",)), Scale())
    torch.set_num_threads(threads)
    assert '"score": 0.5' in path.read_text()


def test_a_table_names_every_processor_that_measured_a_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "BUILD", tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", int)
    empty = Table("one", lambda scale: None, ("score",))
    for name in ("Zen 3", "Xeon with AMX", "Zen 3"):
        monkeypatch.setattr(table, "processor", lambda name=name: name)
        write(empty, Scale(quick=True))
    written = table.load("one", tmp_path)
    assert written["processor"] == "Zen 3 and Xeon with AMX"
    assert all(datetime.date.fromisoformat(day) for day in written["measured"].split(" and "))


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_trains_and_ends_at_its_sparsity(variant: str) -> None:
    task = tiny()
    outcome = training.run_variant(task, variant, 0.5, lr=0.01, seed=0, steps=40)
    assert 0 <= outcome.score <= 100
    whole = 8 * 16 + 16 * 2
    trained = {"dense": whole, "top_kast": whole, "dense, narrow": training.narrow_width(task, 0.5) * 10}
    assert abs(outcome.weights - trained.get(variant, whole / 2)) <= 2


def tiny_wide() -> Classification:
    """Wide enough for two blocks of 32 at 87.5%."""
    x = torch.randn(60, 40, generator=torch.Generator().manual_seed(0))
    examples = Examples(x[:40], (x[:40, 0] > 0).long(), x[40:], (x[40:, 0] > 0).long())
    return Classification("mnist1d_wide", lambda: examples, wide_mlp, width=128, steps=40, batch_size=8)


def test_only_the_layer_between_the_hidden_ones_of_the_wide_mlp_is_sparse() -> None:
    model = wide_mlp(64)
    training.sparsify(model, {"sparsity": 0.5}, 0)
    whole = [int(layer.weight.count_nonzero()) == layer.weight.numel() for layer in model[::2]]  # pyright: ignore
    assert whole == [True, False, True]


def tiny_text() -> ByteText:
    return ByteText(width=32, steps=80, batch_size=2, length=16, layers=1, judged=32)


@pytest.mark.parametrize(
    "module", [structure, structure_times, fine_tuning, transfer], ids=lambda module: module.TABLE.name
)
def test_a_table_runs_in_its_quick_form(
    module: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.TASKS, "stdlib_gpt", tiny_text())  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(table.TASKS, "mnist1d_wide", tiny_wide())  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(table, "BUILD", tmp_path)
    monkeypatch.setattr(Scale, "seeds", range(1))
    module.TABLE.run(Scale(quick=True))
    rows = module.TABLE.rows(tmp_path)
    assert all(math.isfinite(row[name]) for row in rows for name in module.TABLE.values)
    assert len(rows) == len(records.read(tmp_path / f"{module.TABLE.name}.csv"))


def test_models_of_one_task_train_for_the_same_operations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(table.TASKS, "stdlib_gpt", tiny_text())  # pyright: ignore[reportArgumentType]
    monkeypatch.setattr(table, "BUILD", tmp_path)
    monkeypatch.setattr(Scale, "seeds", range(1))
    equal_flops.TABLE.run(Scale(quick=True, only=("stdlib_gpt",)))
    rows = equal_flops.TABLE.rows(tmp_path)
    task = tiny_text()
    costs = {model.label: equal_flops.operations(task, model) for model in equal_flops.MODELS["stdlib_gpt"]}
    budget = 0.1 * equal_flops.BUDGETS["stdlib_gpt"][0] * next(iter(costs.values()))
    assert len(rows) == 4
    # Steps are whole numbers.
    assert all(abs(row["steps"] - budget / costs[row["model"]]) <= 0.5 for row in rows)
    assert all(math.isfinite(row["score"]) for row in rows)


def test_operations_of_a_training_step() -> None:
    task = Classification("tiny", tiny().data, build, width=40, steps=40, batch_size=8)
    dense = equal_flops.operations(task, Model(40))
    sizes = (8 * 40, 40 * 2)
    assert dense == 3 * sum(2 * 8 * size for size in sizes)
    # A quarter stays; each 25th step until three quarters of the run needs the dense gradient, and ranks it.
    usual = sum(3 * 2 * 8 * size / 4 for size in sizes)
    update = sum(2 * 8 * size * 3 / 4 + 2 * size for size in sizes)
    assert equal_flops.operations(task, Model(40, 0.75)) == usual + 0.75 * update / 25


def test_every_algorithm_has_a_variant() -> None:
    assert set(ALGORITHMS) <= set(VARIANTS)


def test_the_same_seed_gives_the_same_run() -> None:
    task = tiny()
    runs = [training.run_variant(task, "rigl", 0.5, lr=0.01, seed=3, steps=10) for _ in range(2)]
    assert (runs[0].score, runs[0].weights) == (runs[1].score, runs[1].weights)


def test_tuning_never_sees_the_test() -> None:
    examples = tiny().data()
    x, _, judged, _ = examples.split(tuning=True)
    assert torch.equal(torch.cat([x, judged]), examples.x)


def test_the_narrow_model_has_as_many_weights() -> None:
    task = TASKS["mnist1d_mlp"]
    model = task.model(training.narrow_width(task, 0.9))
    weights: list[Tensor] = list(training.matrices(model).values())
    assert abs(sum(weight.numel() for weight in weights) - training.kept_weights(task, 0.9)) < 100


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    rates = [training.rate_at(step, 100) for step in range(101)]
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert math.isclose(rates[100], 0.0, abs_tol=1e-12)
    assert rates[5:] == sorted(rates[5:], reverse=True)
