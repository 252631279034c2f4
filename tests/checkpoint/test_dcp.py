"""`torch.distributed.checkpoint` writes checkpoints of rarefy and reads them, whoever wrote them, in any pieces.

Four processes write, of pieces in four and in two, and read again in other pieces; one process reads all of it.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner, load, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ranks import in_processes
from rarefy.checkpoint import directory
from rarefy.checkpoint.dcp import SparseStorageReader, SparseStorageWriter
from rarefy.checkpoint.directory import CheckpointParts, CheckpointWriter
from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.saved_model import open_saved
from rarefy.distributed import Cut

RANKS = 4
BY_USER, IN_TWO, BY_RAREFY, IN_BACKGROUND = "checkpoint_1", "checkpoint_2", "checkpoint_3", "checkpoint_4"


def whole() -> dict[str, Tensor]:
    """A sparse weight and its mask, packed in each quarter; fewer rows than processes; other types."""
    uniform = torch.rand(1030, 131, generator=torch.Generator().manual_seed(0))
    mask = uniform < 0.1
    return {
        "fc.weight": uniform * mask,
        "fc.weight_mask": mask,
        "short": torch.arange(6).view(3, 2),
        "half": torch.arange(7).bfloat16(),
        "none": torch.ones(0, 3),
        "step": torch.tensor(3.0),
    }


def cut(tensor: Tensor, mesh: Any, *placements: Any) -> Any:
    """A tensor in pieces; a number stays whole."""
    return distribute_tensor(tensor, mesh, placements) if tensor.dim() else tensor.clone()


def state_of(model: dict[str, Any], exp_avg: Any) -> dict[str, Any]:
    """What a training program saves."""
    group = {"lr": 0.1, "betas": (0.9, 0.99), "params": [0], "inf": float("inf")}
    return {
        "model": model,
        "optimizer": {"state": {0: {"step": torch.tensor(2.0), "exp_avg": exp_avg}}, "param_groups": [group]},
        "state": {"epoch": 3, "losses": [torch.ones(2), {"last": None}]},
    }


def emptied(value: Any) -> Any:
    """A state of the same form in which nothing is right yet."""
    if isinstance(value, dict):
        return {key: emptied(one) for key, one in value.items()}
    if isinstance(value, list):
        return [emptied(one) for one in value]
    return torch.zeros_like(value) if isinstance(value, Tensor) else "unread"


def is_same(found: Any, expected: Any) -> bool:
    """Whether two states hold the same, of pieces those of this process."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(is_same(found[key], expected[key]) for key in expected)
    if isinstance(expected, list):
        return len(found) == len(expected) and all(map(is_same, found, expected))
    if isinstance(expected, DTensor):
        return found.placements == expected.placements and is_same(found.to_local(), expected.to_local())
    if isinstance(expected, Tensor):
        return found.dtype == expected.dtype and torch.equal(found, expected)
    return type(found) is type(expected) and found == expected


def reads_back(path: Path, expected: dict[str, Any], **options: Any) -> bool:
    found = emptied(expected)
    load(found, storage_reader=SparseStorageReader(path), **options)
    return is_same(found, expected)


def told(action: Any) -> str:
    try:
        action()
    except CheckpointException as failed:
        return str(failed.failures[0][0])
    except CheckpointError as error:
        return str(error)
    return ""


def written(folder: Path, rows: Any, square: Any) -> None:
    """The same, written in all ways."""
    model = {name: cut(one, rows, Shard(0)) for name, one in whole().items()}
    two = {name: cut(one, square, Replicate(), Shard(0)) for name, one in whole().items()}
    weight = whole()["fc.weight"]
    state = state_of(model, cut(weight, rows, Shard(1)))
    save(state, storage_writer=SparseStorageWriter(folder / BY_USER))
    lowest = DefaultSavePlanner(dedup_save_to_lowest_rank=True)
    save(state_of(two, two["fc.weight"]), storage_writer=SparseStorageWriter(folder / IN_TWO), planner=lowest)
    directory.save(folder, 3, CheckpointParts(**{**state, "model": {**model, "tied": model["fc.weight"]}}))
    writer = CheckpointWriter(folder)
    # The second one waits for the first, and both exchange while this process does.
    writer.save_async(5, CheckpointParts(model))
    numbers = torch.ones(1)
    for _ in range(20):
        dist.all_reduce(numbers)
    writer.save_async(4, CheckpointParts({**two, "numbers": numbers}))
    writer.wait()


class Tied(nn.Module):
    """An embedding and a head of one weight, of which the last process has no row."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embedding.weight
        nn.init.ones_(self.head.weight)
        fully_shard(self, mesh=mesh)


def work(folder: Path, rank: int) -> dict[str, Any]:
    """What a process found, and what it was told."""
    rows = init_device_mesh("cpu", (RANKS,))
    square = init_device_mesh("cpu", (2, 2))
    written(folder, rows, square)
    weight = whole()["fc.weight"]
    found: dict[str, Any] = {}
    for name in (BY_USER, IN_TWO, BY_RAREFY):
        for kind, cuts in {
            "rows": (rows, Shard(0)),
            "columns": (rows, Shard(1)),
            "halves": (square, Shard(0), Replicate()),
            "squares": (square, Shard(0), Shard(1)),
        }.items():
            needed = max(getattr(one, "dim", 0) for one in cuts[1:])
            model = {key: cut(one, *cuts) for key, one in whole().items() if one.dim() != 1 or needed == 0}
            expected = state_of(model, cut(weight, *cuts))
            found[f"{name} {kind}"] = reads_back(folder / name, expected)
        found[f"{name} whole"] = reads_back(folder / name, state_of(whole(), weight))
    columns = {name: cut(one, rows, Shard(1)) for name, one in whole().items() if one.dim() == 2}
    wanted = {"model": lambda name, _: Cut.of(columns[name]) if name in columns else None}
    parts = directory.load(folder / BY_RAREFY, cut_as=wanted)
    found["by rarefy"] = is_same({name: parts.model[name] for name in columns}, columns)
    found["by rarefy, whole"] = torch.equal(parts.model["step"], whole()["step"])
    found["tied"] = parts.model["fc.weight"] is parts.model["tied"]
    directory.save(folder / "tied", 1, CheckpointParts(Tied(rows).state_dict()))
    squares = {"model": {"w": cut(torch.ones(4, 4), square, Shard(0), Shard(1))}}
    found["refused"] = told(
        lambda: save(squares, storage_writer=SparseStorageWriter(folder / "checkpoint_9"))
    )
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def results(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return in_processes(RANKS, partial(work, folder), tmp_path_factory.mktemp("ranks"))


def test_each_process_reads_its_pieces_of_what_others_wrote(results: list[dict[str, Any]]) -> None:
    for found in results:
        refused = found.pop("refused")
        assert "w is not cut along one dimension, piece after piece; give planner=" in refused
        assert len(found) == 18 and all(found.values()), found


def test_tied_weights_are_one_where_a_process_has_no_piece(
    results: list[dict[str, Any]], folder: Path
) -> None:
    assert results
    model = directory.load(folder / "tied" / "checkpoint_1").model
    assert model["head.weight"] is model["embedding.weight"]
    assert torch.equal(model["head.weight"], torch.ones(5, 4))


@pytest.mark.parametrize("name", [BY_USER, IN_TWO, BY_RAREFY])
def test_one_process_reads_what_several_wrote(results: list[dict[str, Any]], folder: Path, name: str) -> None:
    weight = whole()["fc.weight"]
    assert reads_back(folder / name, state_of(whole(), weight))
    parts = directory.load(folder / name)
    assert parts.optimizer["param_groups"][0]["betas"] == (0.9, 0.99)
    assert is_same({key: parts.model[key] for key in whole()}, whole())
    assert torch.equal(open_saved(folder / name).dense["fc.weight"], weight)


def test_pieces_are_packed_and_written_once(results: list[dict[str, Any]], folder: Path) -> None:
    sizes = {
        name: sum(file.stat().st_size for file in (folder / name).iterdir()) for name in (BY_USER, IN_TWO)
    }
    # Two weights of a tenth, a mask, and headers; whole they are 1.2 MB.
    assert all(size < 0.25 * 1.2e6 for size in sizes.values())
    assert len(list((folder / IN_TWO).glob("model*.safetensors"))) == 2


def test_what_is_written_in_the_background_is_there(results: list[dict[str, Any]], folder: Path) -> None:
    for name in (IN_BACKGROUND, "checkpoint_5"):
        parts = directory.load(folder / name)
        assert is_same({key: parts.model[key] for key in whole()}, whole())
    # Copied before training went on.
    assert directory.load(folder / IN_BACKGROUND).model["numbers"].tolist() == [float(RANKS**20)]


def save_alone(path: Path, state: dict[str, Any], **options: Any) -> None:
    save(state, storage_writer=SparseStorageWriter(path, **options))


def test_one_process_writes_the_format_of_one(tmp_path: Path) -> None:
    save_alone(tmp_path / "checkpoint_1", state_of(whole(), torch.ones(2)))
    state = json.loads((tmp_path / "checkpoint_1" / "state.json").read_text())
    assert state["format_version"] == 2 and state["step"] == 1 and "cuts" not in state
    assert reads_back(tmp_path / "checkpoint_1", state_of(whole(), torch.ones(2)))


def test_a_checkpoint_takes_the_place_of_another(tmp_path: Path) -> None:
    for step, value in ((1, 1.0), (2, 2.0), (2, 3.0)):
        save_alone(tmp_path / f"checkpoint_{step}", {"model": {"w": torch.tensor(value)}}, keep_last=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_2"]
    assert directory.load(tmp_path / "checkpoint_2").model["w"].item() == 3.0


def test_empty_values_keep_the_places_of_those_after_them(tmp_path: Path) -> None:
    state = {"model": {"w": torch.ones(1)}, "state": {"callbacks": [{}, {"a": 1}, {}, {"b": torch.ones(2)}]}}
    save_alone(tmp_path / "checkpoint_1", state)
    found = directory.load(tmp_path / "checkpoint_1").state["callbacks"]
    assert found[:3] == [{}, {"a": 1}, {}] and found[3]["b"].tolist() == [1.0, 1.0]


def test_a_writer_may_try_again_after_a_failure(tmp_path: Path) -> None:
    writer = SparseStorageWriter(tmp_path / "checkpoint_1")
    told(lambda: save({"state": {"a": Unknown()}}, storage_writer=writer))
    save({"model": {"w": torch.ones(1)}}, storage_writer=writer)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


class Unknown:
    """No value of JSON."""


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        ({"epoch": 3}, 'has no place for epoch; give {"model": model.state_dict()'),
        ({"fc.weight": torch.ones(1)}, "has no place for fc.weight; give"),
        (
            {"model": {"w": torch.ones(2, 2).to_sparse()}},
            "in model, w is not an ordinary dense tensor; keep numbers",
        ),
        ({"state": {"a": Unknown()}}, "in state, a is no plain value; keep numbers"),
        ({"state": {"a": {1, 2}}}, "in state, a holds a set; keep numbers"),
        ({"state": {"a": (torch.ones(1),)}}, "state.a.0 is in a tuple; give a list"),
    ],
)
def test_what_cannot_be_stored_is_refused(tmp_path: Path, state: dict[str, Any], problem: str) -> None:
    save_alone(tmp_path / "checkpoint_1", {"model": {"w": torch.ones(1)}})
    writer = SparseStorageWriter(tmp_path / "checkpoint_2")
    assert problem in told(lambda: save(state, storage_writer=writer))
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_1"]


@pytest.mark.parametrize("name", ["mine", "checkpoint_x", "checkpoint_1.replaced"])
def test_a_path_of_another_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=r"is no name of a checkpoint; give …/checkpoint_<step>"):
        SparseStorageWriter(tmp_path / name)
    assert not SparseStorageWriter.validate_checkpoint_id(tmp_path / name) or name.endswith("replaced")


def test_a_folder_that_only_the_first_process_sees_is_refused(tmp_path: Path) -> None:
    writer = SparseStorageWriter(tmp_path / "checkpoint_1")
    with pytest.raises(CheckpointError, match="does not see the folder that the first one made"):
        writer.write_data(None, None)  # pyright: ignore[reportArgumentType]


def test_the_path_may_be_given_to_torch(tmp_path: Path) -> None:
    writer = SparseStorageWriter(tmp_path / "checkpoint_1")
    save(
        {"model": {"w": torch.ones(1)}},
        storage_writer=writer,
        checkpoint_id=tmp_path / "checkpoint_7",
    )
    assert SparseStorageReader.validate_checkpoint_id(tmp_path / "checkpoint_7")
    assert not SparseStorageReader.validate_checkpoint_id(tmp_path / "checkpoint_1")
    found = {"model": {"w": torch.zeros(1)}}
    reader = SparseStorageReader(tmp_path / "checkpoint_1")
    load(found, storage_reader=reader, checkpoint_id=tmp_path / "checkpoint_7")
    assert found["model"]["w"].item() == 1.0


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = directory.save(tmp_path, 1, CheckpointParts({"w": torch.ones(3)}))
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is damaged"):
        SparseStorageReader(path).read_metadata()
    assert "model.w" in SparseStorageReader(path, check=False).read_metadata().state_dict_metadata


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda state: state["model"].update(w={"$": "tensor", "name": "v"}), "does not fit state.json"),
        (lambda state: state.update(format_version=99), "has checkpoint format 99"),
    ],
)
def test_what_does_not_fit_is_told(tmp_path: Path, change: Any, problem: str) -> None:
    path = directory.save(tmp_path, 1, CheckpointParts({"w": torch.ones(3)}))
    state = json.loads((path / "state.json").read_text())
    change(state)
    (path / "state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match=problem):
        SparseStorageReader(path, check=False).read_metadata()


def test_other_shapes_are_refused(tmp_path: Path) -> None:
    path = directory.save(tmp_path, 1, CheckpointParts({"w": torch.ones(3)}))
    found = {"model": {"w": torch.zeros(4)}}
    assert "Size mismatch" in told(lambda: load(found, storage_reader=SparseStorageReader(path)))
