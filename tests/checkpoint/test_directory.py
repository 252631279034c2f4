"""What is saved comes back exactly; the newest valid checkpoint is always found."""

import hashlib
import json
import math
import re

import pytest
import torch
import yaml
from pydantic import ValidationError
from torch import nn

from rarefy.checkpoint.directory import (
    FILE_NAMES,
    CheckpointConfig,
    CheckpointError,
    CheckpointParts,
    CheckpointWriter,
    load,
    newest_valid,
    save,
)

NAMES = {*FILE_NAMES, "MANIFEST.json"}


def parts(value: float = 1.0) -> CheckpointParts:
    return CheckpointParts(model={"w": torch.full((8,), value)}, state={"global_step": value})


def refuse(message: str) -> None:
    raise AssertionError(f"unexpected warning: {message}")


def names_in(root) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def trained():
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5), nn.BatchNorm1d(5))
    model[1].weight = model[0].weight
    model[1].register_buffer("weight_mask", torch.rand(5, 4) > 0.5)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9))
    model(torch.arange(5)).sum().backward()
    optimizer.step()
    return model, optimizer


def test_a_model_and_its_optimizer_come_back_exactly(tmp_path):
    model, optimizer = trained()
    state = {"k": 7, "scale": math.inf, "values": [0.1, (1, None)], "grads": {0: torch.ones(2).bfloat16()}}
    stored = CheckpointParts(
        model=model.state_dict(),
        optimizer=optimizer.state_dict(),
        state=state,
        rng={"torch": torch.get_rng_state()},
        params={"trainer": {"init": {"seed": 1, "lr": 1e-5, "note": "é"}}},
    )
    loaded = load(save(tmp_path, 7, stored))
    assert list(loaded.model) == list(stored.model)
    assert all(torch.equal(loaded.model[name], tensor) for name, tensor in stored.model.items())
    assert loaded.optimizer["param_groups"] == optimizer.state_dict()["param_groups"]
    for index, moments in optimizer.state_dict()["state"].items():
        assert all(torch.equal(loaded.optimizer["state"][index][name], moments[name]) for name in moments)
    assert loaded.state["values"] == state["values"] and loaded.state["scale"] == math.inf
    assert torch.equal(loaded.state["grads"][0], state["grads"][0])
    assert torch.equal(loaded.rng["torch"], stored.rng["torch"])
    assert loaded.params == stored.params


def test_tied_weights_are_stored_once_and_stay_tied(tmp_path):
    model, _ = trained()
    path = save(tmp_path, 1, CheckpointParts(model=model.state_dict()))
    loaded = load(path).model
    assert loaded["0.weight"] is loaded["1.weight"]
    fresh, _ = trained()
    fresh.load_state_dict(loaded)
    assert fresh[1].weight is fresh[0].weight
    assert torch.equal(fresh.state_dict()["1.weight"], model.state_dict()["1.weight"])


def test_the_directory_holds_exactly_the_documented_files(tmp_path):
    path = save(tmp_path, 12, parts())
    assert path == tmp_path / "checkpoint_12"
    assert set(names_in(path)) == NAMES
    manifest = json.loads((path / "MANIFEST.json").read_text())
    assert manifest["format_version"] == 2 and manifest["step"] == 12
    for name in FILE_NAMES:
        content = (path / name).read_bytes()
        expected = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        assert manifest["files"][name] == expected


def test_nothing_is_pickled(tmp_path):
    path = save(tmp_path, 1, CheckpointParts(*(part.state_dict() for part in trained())))
    for name in NAMES - {f"{part}.safetensors" for part in ("model", "optimizer", "state", "rng")}:
        content = (path / name).read_text()
        assert (yaml.safe_load if name.endswith("yaml") else json.loads)(content) is not None


def test_the_root_is_made(tmp_path):
    assert load(save(tmp_path / "a" / "b", 0, parts())).state == {"global_step": 1.0}


@pytest.mark.parametrize(
    ("field", "value", "place"),
    [
        (
            "state",
            {"schedules": [{"f": print}]},
            "in state, schedules.0.f holds a builtin_function_or_method",
        ),
        ("optimizer", {"state": {0: {1, 2}}}, "in optimizer, state.0 holds a set"),
        ("model", {"w": torch.eye(2).to_sparse()}, "in model, w is not an ordinary dense"),
        ("params", {"model": object()}, "params hold what YAML cannot"),
    ],
)
def test_what_cannot_be_stored_is_named_and_leaves_nothing(tmp_path, field, value, place):
    stored = parts()
    setattr(stored, field, value)
    with pytest.raises(CheckpointError, match=f"checkpoint_3: cannot be saved: .*{place}.*; keep "):
        save(tmp_path, 3, stored)
    assert names_in(tmp_path) == []


def test_the_same_step_is_replaced(tmp_path):
    save(tmp_path, 5, parts(1.0))
    assert load(save(tmp_path, 5, parts(2.0))).state == {"global_step": 2.0}
    assert names_in(tmp_path) == ["checkpoint_5"]


def test_keep_last_deletes_the_oldest(tmp_path):
    for step in (9, 10, 100, 101):
        save(tmp_path, step, parts(), keep_last=2)
    assert names_in(tmp_path) == ["checkpoint_100", "checkpoint_101"]


def test_keep_last_never_deletes_the_one_just_saved(tmp_path):
    save(tmp_path, 500, parts())
    save(tmp_path, 100, parts(), keep_last=2)
    save(tmp_path, 200, parts(), keep_last=2)
    assert names_in(tmp_path) == ["checkpoint_200", "checkpoint_500"]
    save(tmp_path, 300, parts(), keep_last=1)
    assert names_in(tmp_path) == ["checkpoint_300"]


def test_keep_last_does_not_count_incomplete_ones(tmp_path):
    save(tmp_path, 1, parts())
    (tmp_path / "checkpoint_9").mkdir()
    save(tmp_path, 2, parts(), keep_last=2)
    assert newest_valid(tmp_path, lambda _: None) == tmp_path / "checkpoint_2"
    assert (tmp_path / "checkpoint_1").exists()


def test_newest_valid_goes_by_number(tmp_path):
    for step in (9, 10, 0):
        save(tmp_path, step, parts())
    assert newest_valid(tmp_path, refuse) == tmp_path / "checkpoint_10"


def test_newest_valid_ignores_other_names(tmp_path):
    for name in ("checkpoint_x", "my_checkpoint_9", "checkpoint_9.bak", ".tmp-checkpoint_9"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint_99").write_text("a file")
    assert newest_valid(tmp_path, refuse) is None
    assert newest_valid(tmp_path / "gone", refuse) is None


def test_newest_valid_warns_about_what_it_skips(tmp_path):
    for step in (1, 2, 3):
        save(tmp_path, step, parts())
    (tmp_path / "checkpoint_3" / "MANIFEST.json").unlink()
    (tmp_path / "checkpoint_2" / "model.safetensors").write_bytes(b"")
    warnings: list[str] = []
    assert newest_valid(tmp_path, warnings.append) == tmp_path / "checkpoint_1"
    assert [warning[:22] for warning in warnings] == ["skipping checkpoint_3:", "skipping checkpoint_2:"]


def test_leftovers_of_a_kill_go_with_the_next_save(tmp_path):
    (tmp_path / ".tmp-checkpoint_4").mkdir()
    (tmp_path / ".tmp-checkpoint_4" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".tmp-checkpoint_1.replaced").mkdir()
    save(tmp_path, 5, parts())
    assert names_in(tmp_path) == ["checkpoint_5"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path):
    save(tmp_path, 5, parts(1.0)).rename(tmp_path / "checkpoint_5.replaced")
    found = newest_valid(tmp_path, refuse)
    assert found == tmp_path / "checkpoint_5.replaced"
    assert load(tmp_path / "checkpoint_5.replaced").state == {"global_step": 1.0}
    save(tmp_path, 6, parts())
    assert names_in(tmp_path) == ["checkpoint_5", "checkpoint_6"]


def test_a_kill_after_the_second_rename_prefers_the_new_one(tmp_path):
    save(tmp_path, 5, parts(1.0)).rename(tmp_path / "checkpoint_5.replaced")
    save(tmp_path / "elsewhere", 5, parts(2.0)).rename(tmp_path / "checkpoint_5")
    (tmp_path / "elsewhere").rmdir()
    assert newest_valid(tmp_path, refuse) == tmp_path / "checkpoint_5"
    save(tmp_path, 6, parts())
    assert names_in(tmp_path) == ["checkpoint_5", "checkpoint_6"]


class TestWriter:
    def test_it_stores_what_was_there_when_it_was_asked(self, tmp_path):
        writer, weight = CheckpointWriter(tmp_path), torch.zeros(100_000)
        state = {"history": [1]}
        path = writer.save_async(1, CheckpointParts(model={"w": weight}, state=state))
        weight.fill_(9)
        state["history"].append(2)
        writer.wait()
        loaded = load(path)
        assert not loaded.model["w"].any() and loaded.state == {"history": [1]}

    def test_it_keeps_the_last_ones(self, tmp_path):
        writer = CheckpointWriter(tmp_path, keep_last=1)
        for step in range(4):
            writer.save_async(step, parts())
        writer.wait()
        assert names_in(tmp_path) == ["checkpoint_3"]

    def test_an_error_comes_out_of_wait_once(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        writer = CheckpointWriter(tmp_path / "file" / "root")
        writer.save_async(1, parts())
        with pytest.raises(CheckpointError, match="checkpoint_1: cannot be written: Not a directory"):
            writer.wait()
        writer.wait()

    def test_an_error_comes_out_of_the_next_save(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        writer = CheckpointWriter(tmp_path / "file" / "root")
        writer.save_async(1, parts())
        with pytest.raises(CheckpointError, match="checkpoint_1"):
            writer.save_async(2, parts())

    def test_what_cannot_be_stored_is_named_at_once(self, tmp_path):
        with pytest.raises(CheckpointError, match="in state, x holds a set"):
            CheckpointWriter(tmp_path).save_async(1, CheckpointParts(model={}, state={"x": set()}))

    def test_writers_to_one_directory_take_turns(self, tmp_path):
        writers = [CheckpointWriter(tmp_path, keep_last=1) for _ in range(4)]
        for count in range(20):
            writers[count % 4].save_async(5, CheckpointParts(model={"w": torch.full((50_000,), count)}))
        for writer in writers:
            writer.wait()
        assert names_in(tmp_path) == ["checkpoint_5"]
        assert load(tmp_path / "checkpoint_5").model["w"].unique().numel() == 1

    def test_waiting_for_nothing_returns(self, tmp_path):
        CheckpointWriter(tmp_path).wait()
        assert names_in(tmp_path) == []


def test_config_defaults():
    config = CheckpointConfig()
    assert config.steps is None and config.keep_last is None and config.checkpoint_root is None
    assert config.autoload_last_checkpoint and not config.save_initial_checkpoint
    assert not config.disable_strict_checkpoint_loading


@pytest.mark.parametrize(
    "block",
    [
        {"steps": 0},
        {"steps": 1.5},
        {"steps": "100"},
        {"steps": True},
        {"keep_last": 0},
        {"autoload_last_checkpoint": "no"},
        {"checkpoint_root": 5},
        {"step": 100},
    ],
    ids=lambda block: re.sub(r"\W+", "_", str(block)),
)
def test_config_refuses(block):
    with pytest.raises(ValidationError):
        CheckpointConfig(**block)
