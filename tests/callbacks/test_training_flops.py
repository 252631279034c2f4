"""Operations of training, against sums made by hand."""

import pytest
import torch
from torch import nn

from rarefy.callbacks import LogSparsity
from rarefy.callbacks.flops import MOST_FORMS, TrainingFlops, counted_apart
from rarefy.methods.gmp import GMP
from rarefy.methods.mest import MEST
from rarefy.methods.rigl import RigL
from rarefy.methods.set import SET
from rarefy.methods.static import Static
from rarefy.methods.top_kast import TopKAST
from rarefy.storage.training_cost import Cost

# Two layers of 48 and 24 weights see three rows in each step.
ROWS, SIZE = 3, 72
DENSE = 3 * 2 * ROWS * SIZE
UPDATE = 2 * SIZE


def costs(trainer, steps: int, callback: LogSparsity | None = None) -> list[Cost]:
    """What each step adds."""
    if callback is None:
        callback = LogSparsity()
        callback.setup(trainer)
        callback.on_train_start(trainer)
    found = []
    for _ in range(steps):
        before = callback._flops.total
        trainer.step(callback)
        after = callback._flops.total
        found.append(Cost(after.sparse - before.sparse, after.dense - before.dense))
    return found


def test_static(make_trainer):
    assert costs(make_trainer(Static(0.75)), 2) == [Cost(DENSE // 4, DENSE)] * 2


@pytest.mark.parametrize("method", [SET, MEST])
def test_an_update_costs_two_operations_a_position(make_trainer, method):
    found = costs(make_trainer(method(0.5, update={"freq": 2}, seed=0)), 3)
    assert [one.sparse for one in found] == [DENSE // 2, DENSE // 2 + UPDATE, DENSE // 2]
    assert {one.dense for one in found} == {DENSE}


def test_the_dense_gradient_is_counted_whole_in_the_step_of_its_update(make_trainer):
    found = costs(make_trainer(RigL(0.5, update={"freq": 3}, seed=0)), 4)
    collecting = 2 * ROWS * SIZE * (0.5 + 0.5 + 1)
    assert [one.sparse for one in found] == [DENSE / 2, DENSE / 2, collecting + UPDATE, DENSE / 2]


def test_without_updates_by_themselves_any_step_may_be_one(make_trainer):
    sparsity = RigL(0.5, update={"freq": 3}, seed=0)
    trainer = make_trainer(sparsity)
    sparsity.autoupdate = False
    assert {one.sparse for one in costs(trainer, 2)} == {2 * ROWS * SIZE * 2}


def test_connections_are_those_before_the_update(make_trainer):
    sparsity = GMP([0.5, 0.75], update={"freq": 1}, param_filter="*weight")
    found = costs(make_trainer(sparsity), 2)
    assert [one.sparse - UPDATE for one in found] == [DENSE / 2, DENSE / 4]


def test_forward_passes_may_use_fewer_connections_than_are_trained(make_trainer):
    found = costs(make_trainer(TopKAST(0.5, forward_sparsity=0.75, update={"freq": 5}, seed=0)), 1)
    assert found == [Cost(2 * ROWS * SIZE * (0.25 + 0.25 + 0.5), DENSE)]


def test_what_is_between_activations_and_in_dense_weights_costs_the_same(make_trainer):
    trainer = make_trainer(Static(0.5, param_filter="0.weight"))
    assert costs(trainer, 1) == [Cost(3 * 2 * ROWS * (48 // 2 + 24), DENSE)]


def passes(trainer, flops: TrainingFlops, *batches: torch.Tensor) -> list[int]:
    """The dense operations of a forward pass over each."""
    found = []
    for batch in batches:
        before = flops.total.dense
        flops.before_forward(trainer, batch)
        trainer.model(batch)
        flops.after_forward(trainer, trainer.sparsity.algorithms, batch)
        found.append(flops.total.dense - before)
    return found


def test_each_form_of_a_batch_is_counted_once(make_trainer, monkeypatch):
    trainer = make_trainer(Static(0.5))
    flops = TrainingFlops()
    flops.begin(trainer)
    batches = [torch.ones(rows, 8) for rows in (3, 5, 3)]
    assert passes(trainer, flops, *batches) == [3 * 2 * rows * SIZE for rows in (3, 5, 3)]
    assert len(flops._passes) == 2
    monkeypatch.setattr("rarefy.callbacks.flops.MOST_FORMS", 2)
    assert passes(trainer, flops, torch.ones(7, 8)) == [3 * 2 * 7 * SIZE]
    assert len(flops._passes) == 1 < MOST_FORMS


def test_validation_is_not_training(make_trainer):
    trainer = make_trainer(Static(0.5))
    flops = TrainingFlops()
    flops.begin(trainer)
    trainer.model.eval()
    assert passes(trainer, flops, torch.ones(3, 8)) == [0]


class Plain(nn.Module):
    """Draws random numbers, and has statistics."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.drop(self.norm(self.first(x))))


def compiled_in_place(model: nn.Module, backend) -> nn.Module:
    model.compile(backend=backend)
    return model


def compiled_layer(model: nn.Module, backend) -> nn.Module:
    model.first = torch.compile(model.first, backend=backend)
    return model


def wrapped(model: nn.Module, backend) -> nn.Module:
    return torch.compile(model, backend=backend)


def compiled_run(trainer, compiled, compute: str, is_counted: bool) -> tuple[list[int], dict, LogSparsity]:
    """Trains for a few steps; how many graphs were compiled by each of them, and what became of the model."""
    torch.compiler.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    trainer.model = compiled(Plain(), backend)
    trainer.sparsity = RigL(0.5, update={"freq": 2}, seed=0, compute=compute)
    trainer.sparsity.apply(trainer.model)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    trainer.sparsity.apply(trainer.optimizer)
    callback = LogSparsity()
    callback.setup(trainer)
    callback.on_train_start(trainer)
    if not is_counted:
        callback._flops.total = None
    numbers = []
    torch.manual_seed(1)
    for _ in range(4):
        trainer.step(callback)
        numbers.append(len(graphs))
    return numbers, trainer.model.state_dict(), callback


@pytest.mark.parametrize("compiled", [compiled_in_place, compiled_layer, wrapped])
@pytest.mark.parametrize("compute", ["masked", "compact"])
def test_a_compiled_model_is_counted_and_compiled_as_often_as_without(
    make_trainer, caplog, compiled, compute
):
    counted, found, callback = compiled_run(make_trainer(None), compiled, compute, True)
    alone, expected, _ = compiled_run(make_trainer(None), compiled, compute, False)
    assert counted == alone and counted[0] > 0
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    collecting = 2 * ROWS * SIZE * (0.5 + 0.5 + 1)
    assert callback._flops.total == Cost(2 * (DENSE // 2 + int(collecting) + UPDATE), 4 * DENSE)
    assert not [one for one in caplog.records if one.name == "rarefy"]


@pytest.fixture
def begun(monkeypatch):
    """Begins with a model that counts as a compiled one."""

    def begin(trainer) -> LogSparsity:
        monkeypatch.setattr("rarefy.callbacks.flops.is_compiled", lambda model: True)
        callback = LogSparsity()
        callback.setup(trainer)
        callback.on_train_start(trainer)
        return callback

    return begin


def said_by(caplog) -> str:
    (said,) = [one.message for one in caplog.records]
    beginning = "flops/sparse and flops/dense are not logged: the model is under torch.compile, and "
    assert said.startswith(beginning)
    return said.removeprefix(beginning)


def test_a_compiled_model_that_fails_apart_is_not_counted(make_trainer, begun, caplog):
    trainer = make_trainer(Static(0.5))
    callback = begun(trainer)
    callback.on_before_forward(trainer, torch.ones(1, 9))
    assert torch.overrides._get_current_function_mode() is None
    callback.on_after_forward(trainer, None, torch.ones(1, 9))
    assert callback._flops.total is None and callback._flops_metrics() == {}
    said = said_by(caplog)
    assert said.startswith("without it a forward pass fails (RuntimeError: ") and "mat1 and mat2" in said


def test_a_compiled_model_of_many_forms_is_counted_no_longer(make_trainer, begun, monkeypatch, caplog):
    monkeypatch.setattr("rarefy.callbacks.flops.MOST_FORMS_APART", 2)
    trainer = make_trainer(Static(0.5))
    flops = begun(trainer)._flops
    assert passes(trainer, flops, *(torch.ones(rows, 8) for rows in (3, 5, 3))) == [
        3 * 2 * rows * SIZE for rows in (3, 5, 3)
    ]
    flops.before_forward(trainer, torch.ones(7, 8))
    assert flops.total is None
    assert said_by(caplog).startswith("its batches have more than 2 forms; rarefy.summary(sparsity)")


def test_a_compiled_model_of_several_processes_is_not_counted(make_trainer, begun, monkeypatch, caplog):
    monkeypatch.setattr("rarefy.callbacks.flops.ranks", lambda: 2)
    assert begun(make_trainer(Static(0.5)))._flops.total is None
    assert said_by(caplog).startswith("several processes train it")


def test_of_a_dense_compiled_model_nothing_is_said(make_trainer, caplog):
    trainer = make_trainer(None)
    trainer.model.compile(backend="eager")
    callback = LogSparsity()
    callback.setup(trainer)
    callback.on_train_start(trainer)
    assert not caplog.records


def test_of_a_plain_model_nothing_is_said(make_trainer, caplog):
    trainer, callback = make_trainer(Static(0.5)), LogSparsity()
    callback.setup(trainer)
    callback.on_train_start(trainer)
    assert not caplog.records


def test_a_forward_pass_that_fails_leaves_nothing_behind(make_trainer):
    trainer, callback = make_trainer(Static(0.5)), LogSparsity()
    callback.setup(trainer)
    callback.on_train_start(trainer)
    callback.on_before_forward(trainer, torch.ones(1, 8))
    assert torch.overrides._get_current_function_mode() is not None
    callback.on_fit_end(trainer)
    assert torch.overrides._get_current_function_mode() is None


def resumed(trainer, state: dict) -> LogSparsity:
    callback = LogSparsity()
    callback.setup(trainer)
    callback.on_load_checkpoint(trainer, state)
    callback.on_train_start(trainer)
    return callback


def test_a_resumed_run_goes_on_counting(make_trainer):
    trainer, callback, state = make_trainer(Static(0.5)), LogSparsity(), {}
    callback.setup(trainer)
    callback.on_train_start(trainer)
    costs(trainer, 3, callback)
    callback.on_save_checkpoint(trainer, state)
    again = resumed(trainer, state)
    costs(trainer, 2, again)
    assert again._flops.total == Cost(5 * DENSE // 2, 5 * DENSE)


def test_a_checkpoint_that_did_not_count_is_not_gone_on_from(make_trainer):
    trainer = make_trainer(Static(0.5))
    trainer.global_step = 7
    callback = resumed(trainer, {"LogSparsity": {"ever_active": {}}})
    trainer.step(callback)
    assert "flops/sparse" not in trainer.logged[-1][1]


def test_an_embedding_or_a_norm_adds_nothing():
    model = nn.Sequential(nn.Embedding(4, 8), nn.LayerNorm(8))
    flops = TrainingFlops()
    flops.total = Cost()

    class View:
        pass

    view = View()
    view.model = model
    flops.before_forward(view, batch := torch.zeros(2, dtype=torch.long))
    model(batch)
    flops.after_forward(view, [], batch)
    assert flops.total == Cost()


class TakesTheBatchApart(nn.Module):
    """Takes its labels out of the batch, writes to its numbers, and notes how long the longest was."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.longest = 0

    def forward(self, batch):
        batch.pop("labels")
        x = batch["x"].mul_(2.0)
        self.longest = max(self.longest, len(x))
        self.seen = True
        return self.layer(x).sum()


def test_the_pass_of_its_own_leaves_the_batch_and_the_attributes_of_the_model_alone():
    model = TakesTheBatchApart()
    sparsity = Static(0.5)
    sparsity.apply(model)
    batch = {"x": torch.ones(3, 4), "labels": torch.zeros(3)}
    assert counted_apart(model, batch).by_parameter == {"layer.weight": 2 * 3 * 8}
    assert batch.keys() == {"x", "labels"}
    assert torch.equal(batch["x"], torch.ones(3, 4))
    assert model.longest == 0
    assert not hasattr(model, "seen")
    # What `compute: auto` goes by is of the first pass that trains.
    assert sparsity.parameters["layer.weight"].tokens is None
    model(batch).backward()
    assert sparsity.parameters["layer.weight"].tokens == 3


class LooksUp(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(50, 4)
        self.layer = nn.Linear(4, 2)

    def forward(self, batch):
        return self.layer(self.table(batch)).sum()


def test_tables_and_biases_multiply_nothing(make_trainer):
    """They were counted as linear layers: a table of 50 rows twenty times as much as all that the model multiplies."""
    trainer = make_trainer()
    trainer.model = LooksUp()
    sparsity = Static(0.5, param_filter=["table.weight", "layer.*"])
    sparsity.apply(trainer.model)
    flops = TrainingFlops()
    flops.begin(trainer)
    batch = torch.zeros(3, 5, dtype=torch.long)
    flops.before_forward(trainer, batch)
    trainer.model(batch)
    flops.after_forward(trainer, [sparsity], batch)
    dense = 3 * 2 * 3 * 5 * 4 * 2
    assert flops.total == Cost(dense // 2, dense)
