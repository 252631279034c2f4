"""Target and actual sparsity, grown and explored connections."""

import copy

import pytest
import torch

from rarefy.algorithms.group import Group
from rarefy.callbacks import LogSparsity
from rarefy.callbacks.log_sparsity import common_prefix, grown_share
from rarefy.methods.gmp import GMP
from rarefy.methods.rigl import RigL
from rarefy.methods.static import Static

SCHEDULE = {"type": "linear", "init": 0.0, "slope": 0.1}


def started(trainer) -> LogSparsity:
    callback = LogSparsity()
    callback.setup(trainer)
    callback.on_train_start(trainer)
    return callback


def run(trainer, callback: LogSparsity, steps: int) -> list[dict[str, float]]:
    for _ in range(steps):
        trainer.step(callback)
    return [metrics for _, metrics in trainer.logged]


def dead(layer, axis: int) -> float:
    return (~layer.weight_mask.any(axis)).double().mean().item()


def test_a_dense_run_logs_nothing(make_trainer):
    trainer = make_trainer(None)
    assert run(trainer, started(trainer), 2) == []


def test_static(make_trainer):
    trainer = make_trainer(Static(0.9))
    [metrics] = run(trainer, started(trainer), 1)
    actual = {name: (~trainer.model[i].weight_mask).float().mean() for i, name in enumerate("01")}
    assert metrics == {
        "sparsity/*/target": 0.9,
        "sparsity/0.weight/actual": pytest.approx(actual["0"].item()),
        "sparsity/1.weight/actual": pytest.approx(actual["1"].item()),
        "sparsity/model/actual": pytest.approx(1 - (5 + 2) / 72),
        "sparsity/model/explored": pytest.approx((5 + 2) / 72),
        **{f"sparsity/{name}.weight/dead_outputs": dead(trainer.model[int(name)], 1) for name in "01"},
        **{f"sparsity/{name}.weight/dead_inputs": dead(trainer.model[int(name)], 0) for name in "01"},
        "flops/sparse": 3 * 2 * 3 * (5 + 2),
        "flops/dense": 3 * 2 * 3 * 72,
        # Four bytes a number, one a position of the masks; plain SGD keeps nothing.
        **{"memory/weights/sparse": 4 * 82 + 72, "memory/weights/dense": 4 * 82},
        **{f"memory/gradients/{kind}": 4 * 82 for kind in ("sparse", "dense")},
        **{f"memory/states/{kind}": 0 for kind in ("sparse", "dense")},
    }


def test_the_actual_sparsity_is_measured_and_not_copied(make_trainer):
    trainer = make_trainer(Static(0.9))
    callback = started(trainer)
    trainer.model[0].weight_mask.fill_(True)
    assert run(trainer, callback, 1)[0]["sparsity/0.weight/actual"] == 0


def test_a_schedule_is_logged_once_under_the_common_prefix(make_trainer):
    trainer = make_trainer(GMP(SCHEDULE, param_filter="*.weight"))
    metrics = run(trainer, started(trainer), 3)
    assert [step["sparsity/*/target"] for step in metrics] == pytest.approx([0.1, 0.2, 0.3])
    assert metrics[2]["sparsity/0.weight/actual"] == pytest.approx(1 - round(0.7 * 48) / 48)
    assert sum(name.endswith("/target") for name in metrics[0]) == 1


def test_a_single_parameter_is_its_own_prefix(make_trainer):
    trainer = make_trainer(GMP(SCHEDULE, param_filter="1.weight"))
    assert "sparsity/1.weight*/target" in run(trainer, started(trainer), 1)[0]


def test_two_algorithms_with_one_prefix_do_not_hide_each_other(make_trainer):
    trainer = make_trainer(
        Group([Static(0.5, param_filter="0.weight"), Static(0.25, param_filter="1.weight")])
    )
    [metrics] = run(trainer, started(trainer), 1)
    assert metrics["sparsity/*/target"] == 0.5 and metrics["sparsity/*[2]/target"] == 0.25


def test_only_log_steps_are_logged(make_trainer):
    trainer = make_trainer(Static(0.5), log_every=3)
    run(trainer, started(trainer), 7)
    assert [step for step, _ in trainer.logged] == [3, 6]


def test_grown_is_the_share_of_replaced_connections_once_per_update(make_trainer):
    trainer = make_trainer(RigL(0.5, drop_fraction=0.5, update={"freq": 4}, seed=0))
    before = trainer.model[0].weight_mask.clone()
    metrics = run(trainer, started(trainer), 6)
    after = trainer.model[0].weight_mask
    has_grown = ["sparsity/0.weight/grown" in step for step in metrics]
    assert has_grown == [False, False, False, True, False, False]
    assert metrics[3]["sparsity/0.weight/grown"] == grown_share(before, after) > 0


def test_what_only_an_update_changes_is_logged_once_per_update(make_trainer):
    trainer = make_trainer(RigL(0.5, drop_fraction=0.5, update={"freq": 4}, seed=0))
    before = trainer.model[0].weight_mask.clone()
    metrics = run(trainer, started(trainer), 5)
    after = trainer.model[0].weight_mask
    # The first topology is looked at, too, but has none before it to differ from.
    has_dead = ["sparsity/0.weight/dead_inputs" in step for step in metrics]
    has_memory = ["memory/states/sparse" in step for step in metrics]
    has_hamming = ["sparsity/0.weight/hamming" in step for step in metrics]
    assert has_dead == has_memory == [True, False, False, True, False]
    assert has_hamming == [False, False, False, True, False]
    assert metrics[3]["sparsity/0.weight/hamming"] == (before != after).double().mean().item() > 0
    assert metrics[3]["sparsity/0.weight/dead_inputs"] == dead(trainer.model[0], 0)


def test_an_update_between_log_steps_is_logged_at_the_next(make_trainer):
    trainer = make_trainer(RigL(0.5, drop_fraction=0.5, update={"freq": 2, "stop": 3}, seed=0), log_every=3)
    metrics = run(trainer, started(trainer), 6)
    assert ["sparsity/0.weight/grown" in step for step in metrics] == [True, False]


def test_explored_grows_with_every_topology(make_trainer):
    trainer = make_trainer(RigL(0.5, drop_fraction=0.5, update={"freq": 2}, seed=0))
    callback = started(trainer)
    ever = [layer.weight_mask.clone() for layer in trainer.model]
    for _ in range(8):
        trainer.step(callback)
        ever = [seen | layer.weight_mask for seen, layer in zip(ever, trainer.model, strict=True)]
        explored = trainer.logged[-1][1]["sparsity/model/explored"]
        assert explored == pytest.approx(sum(int(seen.sum()) for seen in ever) / 72)
    assert trainer.logged[-1][1]["sparsity/model/explored"] > 0.5


def test_a_resumed_run_remembers_what_was_explored(make_trainer):
    trainer = make_trainer(RigL(0.5, drop_fraction=0.5, update={"freq": 1}, seed=0))
    callback = started(trainer)
    run(trainer, callback, 3)
    state = {}
    callback.on_save_checkpoint(trainer, state)
    resumed = LogSparsity()
    resumed.setup(trainer)
    resumed.on_load_checkpoint(trainer, state)
    resumed.on_train_start(trainer)
    kept = {name: mask.clone() for name, mask in state["LogSparsity"]["ever_active"].items()}
    fresh = started(trainer)
    assert resumed._explored() == callback._explored() > fresh._explored()
    run(trainer, resumed, 1)
    assert all(torch.equal(state["LogSparsity"]["ever_active"][name], mask) for name, mask in kept.items())


def test_a_checkpoint_without_its_state_starts_afresh(make_trainer):
    trainer = make_trainer(Static(0.5))
    callback = LogSparsity()
    callback.setup(trainer)
    callback.on_load_checkpoint(trainer, {})
    callback.on_train_start(trainer)
    assert callback._explored() == 0.5


def test_first_masks_that_come_late_are_no_update(make_trainer):
    trainer = make_trainer(RigL(0.5, update={"freq": 9}, seed=0))
    callback = LogSparsity()
    callback.setup(trainer)
    callback.on_fit_start(trainer)
    [algorithm] = trainer.sparsity.algorithms
    first = algorithm.parameters["0.weight"]
    algorithm._set_mask(first, ~first.mask)
    callback.on_train_start(trainer)
    [metrics] = run(trainer, callback, 1)
    assert metrics["sparsity/model/explored"] == 0.5 and "sparsity/0.weight/hamming" not in metrics
    assert metrics["flops/sparse"] == metrics["flops/dense"] / 2


def test_one_callback_may_serve_several_trainers(make_trainer):
    first, second = make_trainer(RigL(0.5, update={"freq": 1}, seed=0)), make_trainer(Static(0.5))
    callback = started(first)
    callback.setup(second)
    callback.on_train_start(second)
    first.step(LogSparsity())
    assert "sparsity/0.weight/grown" not in run(second, callback, 1)[0]


def test_grown_share_of_an_empty_mask():
    assert grown_share(torch.tensor([True]), torch.tensor([False])) == 0


@pytest.mark.parametrize(
    ("names", "prefix"),
    [(["a.b", "a.c"], "a."), (["x"], "x"), (["a", "b"], ""), (["layer", "layer.1"], "layer")],
)
def test_common_prefix(names, prefix):
    assert common_prefix(names) == prefix


@pytest.mark.parametrize("stop", [3, 4, 5])
def test_a_resumed_run_logs_what_the_one_before_would_have_logged(make_trainer, stop):
    """Also of an update between the last log step and the checkpoint; and no start of a run that began long ago."""
    trainer = make_trainer(RigL(0.5, drop_fraction=0.5, update={"freq": 4}, seed=0), 3)
    callback = started(trainer)
    run(trainer, callback, stop)
    state = {}
    callback.on_save_checkpoint(trainer, state)
    resumed = LogSparsity()
    resumed.setup(trainer)
    resumed.on_load_checkpoint(trainer, copy.deepcopy(state))
    resumed.on_train_start(trainer)
    run(trainer, callback, 6 - stop)
    resumed.on_train_batch_end(trainer, {})
    expected, found = (metrics for _, metrics in trainer.logged[-2:])
    own = [name for name in expected if not name.startswith("flops/")]
    assert ("sparsity/0.weight/hamming" in expected) and ("memory/states/sparse" in expected)
    assert {name: expected[name] for name in own} == {name: found.get(name) for name in own}
    assert not {*found} - {*expected}
