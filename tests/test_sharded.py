"""A model that `fully_shard` cuts in pieces has the masks that one process would give it."""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

import rarefy
from ranks import NEEDS_FULLY_SHARD, start_copies
from rarefy.checkpoint.directory import CheckpointParts, load, save
from rarefy.distributed import Cut
from rarefy.errors import RarefyError

sys.path.insert(0, str(Path(__file__).parent))
from sharded_runs import CASES, RIGL, Case, Run, build, cut

# (ranks, case, order): every case in two processes; in four those that place counts most for, and a mesh of copies.
pytestmark = NEEDS_FULLY_SHARD
IN_FOUR = {
    "gmp tied": "before",
    "set": "after",
    "rigl twice": "before",
    "gmp": "after",
    "global tied": "after",
}
RUNS = [(2, name, "after" if index % 2 else "before") for index, name in enumerate(CASES)]
# What is saved of a run, and how many numbers of its own each connection has.
RESUMED = {"rigl twice": 0, "movement": 1, "top-kast": 1, "own": 2}
RUNS += [(4, name, order) for name, order in IN_FOUR.items()]


IN_PIECES = ("gmp", "set", "rigl erk", "mest", "ac/dc", "granet", "global")


def told(action):
    """The message of the error that `action` raises."""
    try:
        action()
    except RarefyError as error:
        return str(error)
    return ""


def refusals(rank):
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    parallel = build()
    parallelize_module(parallel, mesh, {"0": ColwiseParallel()})
    sharded = build()
    cut(sharded)
    late = build()
    rarefy.SET(0.5).apply(late)
    cut(late)
    run = Run(CASES["set"], "before", (rank, 2))
    mixed = build()
    sparsity = rarefy.SET(0.5)
    sparsity.apply(mixed)
    parallelize_module(mixed, mesh, {"0": ColwiseParallel()})
    return {
        "tensor parallel": told(lambda: rarefy.SET(0.5).apply(parallel)),
        "tensor parallel later": told(lambda: sparsity.apply(torch.optim.SGD(mixed.parameters()))),
        "compact": told(lambda: rarefy.SET(0.5, compute="compact").apply(sharded)),
        "no optimizer": told(lambda: late(torch.ones(2, 12).double())),
        "track": told(lambda: run.sparsity.track(build())),
    }


def facts(rank):
    """What one process alone may ask, and the form of what a state dict holds."""
    run = Run(Case(RIGL), "before", (rank, 2))
    mask = run.model.state_dict()["0.weight_mask"]
    weight = run.model[0].weight
    shown = [(row.storage, row.actual) for row in rarefy.summary(run.sparsity).rows] if rank == 0 else None
    is_like = (
        isinstance(mask, DTensor) and mask.placements == weight.placements and mask.shape == weight.shape
    )
    run.step()
    run.optimizer.zero_grad()
    entries = run.sparsity.parameters["0.weight"].gradient_entries()
    loss = run.model(torch.ones(4, 12).double()).sum()
    loss.backward()
    parameter = run.sparsity.parameters["0.weight"]
    found = parameter.gradient_entries()
    parameter.set_gradient_entries(found * 2)
    is_set = torch.equal(parameter.gradient_entries(), found * 2) and bool(found.any()) and not entries.any()
    return {
        "entries": is_set,
        "mask is cut like its weight": is_like,
        "rows": mask.to_local().shape[0],
        "shown": shown,
    }


class Reversed(rarefy.RigL):
    """Looks at its view as a whole, which a class need not say."""

    def drop_score(self, weight, dense_grad):
        assert not isinstance(weight, DTensor)
        return weight.flip(0).abs()


def gathered(rank):
    """How many weights each algorithm gathers in a step with an update."""
    counts = {}
    gather = Cut.whole

    def counting(cut, piece):
        counts[name] = counts.get(name, 0) + 1
        return gather(cut, piece)

    Cut.whole = counting
    for name in (*IN_PIECES, "blocks", "reversed"):
        case = CASES.get(name, Case({**RIGL, "algorithm": "test_sharded:Reversed"}))
        run = Run(case, "before", (rank, 2))
        run.present_masks = dict
        counts[name] = 0
        run.step()
    Cut.whole = gather
    return counts


def resumed(rank, name, order, folder):
    """Whether a run that is loaded goes on as if nothing had been, and of which sizes its own numbers are here."""
    case = CASES[name]
    steady = Run(case, order, (rank, 2))
    steady.go(3)
    first = Run(case, order, (rank, 2))
    first.go(1)
    state = first.sparsity.state_dict()
    save(Path(folder, name), 1, CheckpointParts(first.model.state_dict(), None, state))
    second = Run(case, order, (rank, 2))
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    kept = state.get("connections", {}).get("0.weight", {})
    numbers = [*kept.get("state", {}).values(), *([kept["forward"]] if "forward" in kept else [])]
    before = [one.to_local().clone() for one in numbers]
    second.sparsity.load_state_dict(state)
    untouched = all(torch.equal(one.to_local(), was) for one, was in zip(numbers, before, strict=True))
    second.count = 1
    ends = second.go(2)["masks"][-1], steady.present_masks()
    same = untouched and all(torch.equal(mask, ends[1][name]) for name, mask in ends[0].items())
    return same, [tuple(one.to_local().shape) for one in numbers]


def brought(rank):
    """The states of connections that a state dict brings, and of those that are inactive then; how many are new."""
    run = Run(Case(RIGL), "before", (rank, 2))
    optimizer = torch.optim.Adagrad(run.model.parameters(), initial_accumulator_value=0.5)
    run.sparsity.apply(optimizer)
    weight, active = run.model[0].weight, run.model[0].weight_mask.to_local()
    first = {name: tensor.clone() for name, tensor in run.model.state_dict().items()}
    other = {name: tensor.clone() for name, tensor in first.items()}
    other["0.weight_mask"].to_local().logical_not_()
    run.model.load_state_dict(other)
    old = active.clone()
    run.model.load_state_dict(first)
    state = optimizer.state[weight]["sum"].to_local()
    new = active & ~old
    return state[new].unique().tolist(), state[~active].unique().tolist(), int(new.sum())


def assigned(rank):
    """Whether a gradient that somebody holds stays whole when it is used, and zeros are held."""
    run = Run(CASES["static"], "before", (rank, 2))
    run.step()
    weight = run.model[0].weight
    weight.grad = held = torch.ones_like(weight)
    run.optimizer.step()
    mask = run.model[0].weight_mask.to_local()
    return bool(held.to_local().all()), not weight.to_local()[~mask].any()


def finalized(rank):
    run = Run(CASES["rigl erk"], "after", (rank, 2))
    run.go(2)
    masks = run.present_masks()
    rarefy.finalize(run.model)
    state = run.model.state_dict()
    zeros = [not state[name.removesuffix("_mask")].full_tensor()[~mask].any() for name, mask in masks.items()]
    return sorted(state), zeros


def work(rank, address, folder, ranks):
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    results = {
        name: Run(CASES[name], order, (rank, ranks)).go() for size, name, order in RUNS if size == ranks
    }
    if ranks == 2:
        results["refusals"] = refusals(rank)
        results["facts"] = facts(rank)
        results["brought"] = brought(rank)
        results["assigned"] = assigned(rank)
        results["gathered"] = gathered(rank)
        results["resumed"] = {
            name: resumed(rank, name, order, folder)
            for name, order in zip(RESUMED, ("before", "after", "before", "after"), strict=True)
        }
        results["finalized"] = finalized(rank)
    else:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "pieces"))
        run = Run(CASES["rigl erk"], "before", (rank, ranks), mesh)
        results["copies"] = run.go()
        save(Path(folder, "saved"), 1, CheckpointParts(model=run.model.state_dict()))
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def started(folder, ranks):
    """The results of all processes, and what they have saved together."""
    start_copies(work, ranks, f"file://{folder}/rendezvous", str(folder), ranks)
    results = [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]
    if ranks == 2:
        results[0]["kept"] = {name: load(folder / name / "checkpoint_1") for name in RESUMED}
    else:
        results[0]["saved"] = load(folder / "saved" / "checkpoint_1").model
    return results


@pytest.fixture(scope="module")
def in_two(tmp_path_factory):
    return started(tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def in_four(tmp_path_factory):
    return started(tmp_path_factory.mktemp("four"), 4)


@functools.cache
def alone(name):
    """What one process makes of a case."""
    return Run(CASES[name]).go()


def assert_as_in_one_process(name, found):
    expected = alone(name)
    for one, other in zip(expected["masks"], found["masks"], strict=True):
        assert all(torch.equal(mask, other[name]) for name, mask in one.items())
    torch.testing.assert_close(found["tensors"], expected["tensors"], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_the_masks_of_one(in_two, name):
    for result in in_two:
        assert_as_in_one_process(name, result[name])


@pytest.mark.parametrize("name", IN_FOUR)
def test_four_processes_make_the_masks_of_one(in_four, name):
    for result in in_four:
        assert_as_in_one_process(name, result[name])


def test_a_mesh_of_copies_and_pieces_makes_the_masks_of_one(in_four):
    assert_as_in_one_process("rigl erk", in_four[3]["copies"])


def test_of_processes_with_the_same_pieces_one_writes_them(in_four):
    saved = in_four[0]["saved"]
    run = in_four[0]["copies"]
    whole = {name: run["tensors"][name] for name in saved if not name.endswith("mask")} | run["masks"][-1]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in whole.items())


def test_the_cases_change_masks():
    masks = alone("rigl erk")["masks"]
    assert any(not torch.equal(masks[0][name], mask) for name, mask in masks[-1].items())


@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_run_resumes(in_two, name):
    assert [result["resumed"][name] for result in in_two] == [(True, [(7, 12)] * RESUMED[name])] * 2


@pytest.mark.parametrize("name", ["movement", "top-kast", "own"])
def test_numbers_that_were_kept_in_pieces_are_whole_in_one_process(in_two, name):
    run = Run(CASES[name])
    run.go(1)
    saved = in_two[0]["kept"][name]
    anew = Run(CASES[name])
    anew.model.load_state_dict(saved.model)
    anew.sparsity.load_state_dict(saved.state)
    assert dict(anew.present_masks()).keys() == run.present_masks().keys()
    for one, other in zip(anew.sparsity.parameters.values(), run.sparsity.parameters.values(), strict=True):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(one.dense_state(), other.dense_state(), rtol=1e-10, atol=1e-13)
        assert one.forward.is_hiding == (name != "movement")
        torch.testing.assert_close(one.forward.hidden, other.forward.hidden)


def test_masks_are_cut_like_their_weights(in_two):
    first, second = (result["facts"] for result in in_two)
    assert first["entries"] and second["entries"]
    assert first["mask is cut like its weight"] and second["mask is cut like its weight"]
    assert (first["rows"], second["rows"]) == (7, 7)
    assert [storage for storage, _ in first["shown"]] == ["masked"] * 3


def test_optimizers_begin_with_connections_that_a_state_dict_brings(in_two):
    for new, inactive, count in (result["brought"] for result in in_two):
        assert new == [0.5] and inactive == [0.0] and count > 5


def test_a_gradient_that_was_assigned_stays_whole_where_it_is_held(in_two):
    assert [result["assigned"] for result in in_two] == [(True, True)] * 2


def test_what_ranks_each_connection_by_itself_gathers_nothing(in_two):
    found = in_two[0]["gathered"]
    assert [found[name] for name in IN_PIECES] == [0] * len(IN_PIECES)
    # Weight, mask and dense gradient, of each weight.
    assert (found["blocks"], found["reversed"]) == (6, 9)


def test_a_finalized_model_has_zeros_and_no_masks(in_two):
    names = sorted(name for name, _ in build().named_parameters())
    assert [result["finalized"] for result in in_two] == [(names, [True] * 3)] * 2


def test_what_cannot_be_done_is_refused_clearly(in_two):
    first, second = (result["refusals"] for result in in_two)
    assert first == second
    assert first == {
        "tensor parallel": (
            "apply: a model whose 0.weight is a DTensor of tensor parallelism is not allowed; give a model that is not "
            "cut in this way; sparsity needs whole weights in each process, or pieces that fully_shard cuts: wrap the "
            "model in DistributedDataParallel, or call torch.distributed.fsdp.fully_shard on it"
        ),
        "tensor parallel later": (
            "weight of a Linear is now a DTensor of tensor parallelism, and was sparse before; sparsity needs whole "
            "weights in each process, or pieces that fully_shard cuts: wrap the model in DistributedDataParallel, or "
            "call torch.distributed.fsdp.fully_shard on it"
        ),
        "compact": (
            "compute: compact for 0.weight (fully_shard cuts it in pieces) is not allowed; give auto, which "
            "takes compact storage where it can (example: compute: auto)"
        ),
        "no optimizer": (
            "weight of a Linear was cut by fully_shard after it became sparse, and no optimizer that is followed "
            "trains its pieces; build the optimizer after fully_shard and call sparsity.apply(optimizer) before the "
            "first forward pass"
        ),
        "track": (
            "track is not allowed for a model whose 0.weight was cut by fully_shard; average the pieces by yourself, "
            "or finalize first"
        ),
    }
