"""run.json and the sparsity of the whole model."""

import json

import pytest
import torch
from torch import nn

from rarefy.algorithms.group import Group
from rarefy.callbacks import RunRecord
from rarefy.callbacks.run_record import FILE_NAME, model_target, read_record
from rarefy.errors import RarefyError
from rarefy.methods.gmp import GMP
from rarefy.methods.rigl import RigL
from rarefy.methods.static import Static
from rarefy.trainer.trainer import Trainer


def forward(trainer, callback: RunRecord, batch: torch.Tensor) -> None:
    callback.on_before_forward(trainer, batch)
    outputs = trainer.model(batch)
    callback.on_after_forward(trainer, outputs, batch)


def test_it_tells_what_is_sparse_and_what_a_forward_pass_costs(make_trainer):
    group = Group(
        [RigL(0.5, balance_out_groups=2, param_filter="0.weight"), Static(0.75, param_filter="1.weight")]
    )
    trainer, callback = make_trainer(group), RunRecord(now=lambda: "noon")
    callback.on_fit_start(trainer)
    forward(trainer, callback, torch.ones(3, 8))
    trainer.global_step = 7
    callback.on_fit_end(trainer)
    record = read_record(trainer.model_dir)
    assert record["sparse"] == {
        "0.weight": {
            "algorithm": "rigl", "shape": [6, 8], "storage": "masked", "balance": "balance_out_groups", "groups": 2,
        },
        "1.weight": {"algorithm": "static", "shape": [4, 6], "storage": "masked"},
    }  # fmt: skip
    weights = {"0.weight": 2 * 3 * 48, "1.weight": 2 * 3 * 24}
    assert record["forward"] == {
        "samples": 3,
        "tokens": None,
        "total": sum(weights.values()),
        "weights": weights,
    }
    [session] = record["sessions"]
    assert (session["started"], session["ended"]) == ("noon", "noon")
    assert (session["first_step"], session["last_step"]) == (0, 7)
    assert session["torch"] == torch.__version__ and session["device"] == "cpu"
    assert record["weights"] == 48 + 24 + 6 + 4 and record["total_steps"] == 100


def test_only_the_first_forward_pass_of_training_is_counted(make_trainer):
    trainer, callback = make_trainer(Static(0.5)), RunRecord()
    callback.on_fit_start(trainer)
    trainer.model.eval()
    forward(trainer, callback, torch.ones(1, 8))
    assert "forward" not in read_record(trainer.model_dir)
    trainer.model.train()
    forward(trainer, callback, torch.ones(3, 8))
    forward(trainer, callback, torch.ones(5, 8))
    assert read_record(trainer.model_dir)["forward"]["samples"] == 3


def test_a_weight_that_computes_in_its_own_way_counts_as_a_linear_layer(make_trainer):
    trainer, callback = make_trainer(Static(0.5)), RunRecord()
    callback.on_fit_start(trainer)
    batch = torch.ones(3, 8)
    callback.on_before_forward(trainer, batch)
    callback.on_after_forward(trainer, None, batch)
    assert read_record(trainer.model_dir)["forward"]["weights"]["0.weight"] == 2 * 3 * 48


def test_a_compiled_model_is_left_alone(make_trainer):
    trainer, callback = make_trainer(), RunRecord()
    trainer.model = torch.compile(nn.Linear(8, 1), backend="eager")
    callback.on_fit_start(trainer)
    callback.on_before_forward(trainer, torch.ones(1, 8))
    assert callback._flops is None
    trainer.model = nn.Linear(8, 1)
    trainer.model.compile(backend="eager")
    callback.on_before_forward(trainer, torch.ones(1, 8))
    assert callback._flops is None


def test_a_forward_pass_that_fails_leaves_nothing_behind(make_trainer):
    trainer, callback = make_trainer(), RunRecord()
    callback.on_fit_start(trainer)
    callback.on_before_forward(trainer, torch.ones(1, 8))
    assert torch.overrides._get_current_function_mode() is not None
    callback.on_fit_end(trainer)
    assert torch.overrides._get_current_function_mode() is None


def test_a_continued_run_adds_a_session_and_a_new_one_begins_afresh(make_trainer):
    trainer = make_trainer()
    for first, sessions in ((0, 1), (5, 2), (0, 1)):
        trainer.global_step = first
        RunRecord().on_fit_start(trainer)
        assert len(read_record(trainer.model_dir)["sessions"]) == sessions


def test_the_sparsity_of_the_model_is_logged_on_log_steps(make_trainer):
    linear = {"type": "linear", "init": 0.0, "slope": 0.1}
    trainer = make_trainer(GMP(linear, param_filter="*weight"), log_every=2)
    callback = RunRecord()
    callback.on_fit_start(trainer)
    for _ in range(4):
        trainer.step(callback)
    assert [step for step, _ in trainer.logged] == [2, 4]
    kept = (round(0.6 * 48) + round(0.6 * 24)) / 72
    expected = {"sparsity/target": pytest.approx(0.4), "sparsity/actual": pytest.approx(1 - kept)}
    assert trainer.logged[-1][1] == expected


def test_a_dense_run_has_no_sparsity(make_trainer):
    trainer, callback = make_trainer(), RunRecord()
    callback.on_fit_start(trainer)
    trainer.step(callback)
    assert trainer.logged == [] and model_target(trainer) == 0
    assert read_record(trainer.model_dir)["sparse"] == {}


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"format": 99}', "\xff", pytest.param("[" * 100_000, id="nested")]
)
def test_a_damaged_record_counts_as_none(tmp_path, text):
    (tmp_path / FILE_NAME).write_text(text, encoding="latin-1")
    assert read_record(tmp_path) == {}


def test_a_record_that_cannot_be_written(make_trainer, tmp_path):
    (tmp_path / "file").write_text("")
    trainer = make_trainer(model_dir=tmp_path / "file" / "run")
    with pytest.raises(RarefyError, match=r"run\.json: cannot be written: .*; free space or fix"):
        RunRecord().on_fit_start(trainer)


def test_in_a_real_run(tmp_path):
    class Squared(nn.Linear):
        def forward(self, batch):
            return super().forward(batch).square().mean()

    trainer = Trainer(
        model_dir=tmp_path, model=lambda: Squared(4, 4), device="cpu", sparsity=0.5, loggers=[], seed=1,
        loop={"max_steps": 2}, optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1),
        callbacks=[RunRecord()], checkpoint={"checkpoint_root": tmp_path / "elsewhere"},
    )  # fmt: skip
    trainer.fit([torch.ones(3, 4)])
    record = json.loads((tmp_path / FILE_NAME).read_text())
    assert record["forward"]["weights"] == {"weight": 2 * 3 * 16}
    assert record["sessions"][0]["last_step"] == 2 and record["checkpoint_root"] == str(
        tmp_path / "elsewhere"
    )
