"""What a trainer is made of, from objects or from functions."""

import random
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rarefy.trainer.session_builder as session_builder
from rarefy.callbacks.dispatch import Dispatcher
from rarefy.callbacks.events import Callback, Logger
from rarefy.config import configure
from rarefy.errors import ConfigError, RarefyError
from rarefy.storage.optimizer_traits import trained_parameters

CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.1)


def test_models_and_functions_that_make_them() -> None:
    model = nn.Linear(2, 2)
    assert session_builder.make_model(model, CPU) is model
    assert isinstance(session_builder.make_model(partial(nn.Linear, 2, 2), CPU), nn.Linear)
    for wrong in (5, lambda: 5):
        with pytest.raises(RarefyError, match=r"model is 5; give a torch.nn.Module"):
            session_builder.make_model(wrong, CPU)  # type: ignore[arg-type]


def test_optimizers_and_functions_that_make_them() -> None:
    model = nn.Linear(2, 2)
    made = session_builder.make_optimizer(lambda one: SGD(one.parameters()), model)
    assert made is not None and list(trained_parameters(made)) == list(model.parameters())
    assert session_builder.make_optimizer(made, model) is made
    assert session_builder.make_optimizer(None, model) is None
    with pytest.raises(RarefyError, match=r"optimizer is 5; give a torch.optim.Optimizer"):
        session_builder.make_optimizer(lambda one: 5, model)  # type: ignore[arg-type, return-value]
    with pytest.raises(RarefyError, match="trains none of the model's parameters"):
        session_builder.make_optimizer(SGD(nn.Linear(2, 2).parameters()), model)


def test_schedulers_and_functions_that_make_them() -> None:
    optimizer = SGD(nn.Linear(2, 2).parameters())
    ready = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    make = partial(torch.optim.lr_scheduler.StepLR, step_size=3)
    assert session_builder.make_schedulers(ready, optimizer) == [ready]
    assert len(session_builder.make_schedulers([ready, make], optimizer)) == 2
    assert (
        session_builder.make_schedulers(None, optimizer) == session_builder.make_schedulers(make, None) == []
    )
    with pytest.raises(RarefyError, match=r"schedulers has 5; give a torch LRScheduler"):
        session_builder.make_schedulers([5], optimizer)  # type: ignore[list-item]


def test_sparsity_from_a_block_an_algorithm_or_a_function() -> None:
    ready = configure(0.5)
    assert session_builder.make_sparsity(ready, None, None) is ready
    assert session_builder.make_sparsity(None, None, None) is None
    made = session_builder.make_sparsity(lambda: {"algorithm": "set", "sparsity": 0.5}, None, 3)
    assert made is not None and (made.algorithms[0].name, made.algorithms[0].seed) == ("set", 3)
    block = {"algorithm": "set", "sparsity": 0.5, "update": {"freq": "50%"}}
    made = session_builder.make_sparsity(block, 10, None)
    assert made is not None and made.algorithms[0].next_update_step(1) == 5


def test_devices() -> None:
    assert session_builder.resolve_device("CPU") == session_builder.resolve_device(CPU) == CPU
    assert session_builder.resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ConfigError, match=r"device: 'quantum' is not allowed"):
        session_builder.resolve_device("quantum")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_no_gpu_here(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"device: GPU \(there is no GPU here\)"):
        session_builder.resolve_device("GPU")
    assert session_builder.resolve_device("CSX") == session_builder.resolve_device("auto")
    assert "there is no Cerebras system here" in caplog.text


def test_seeding() -> None:
    def draw() -> list[float]:
        return [torch.rand(()).item(), random.random(), np.random.rand()]

    session_builder.seed_everything(5)
    first = draw()
    session_builder.seed_everything(None)
    assert draw() != first
    session_builder.seed_everything(5)
    assert draw() == first


def test_events_reach_only_those_who_listen_in_order() -> None:
    heard = []

    class Listener(Callback):
        def __init__(self, name: str) -> None:
            self.name = name

        def on_fit_end(self, trainer: Any) -> None:
            heard.append(self.name)

    class Writer(Listener, Logger):
        pass

    emit = Dispatcher(None, [Listener("a"), Callback(), Listener("b")], [Writer("c")])
    emit("on_fit_end")
    emit("on_fit_start")
    assert heard == ["a", "b", "c"]


def test_what_is_no_callback_is_refused() -> None:
    with pytest.raises(RarefyError, match=r"callbacks has .*Callback.*not the class itself"):
        Dispatcher(None, [Callback], [])  # type: ignore[list-item]
    with pytest.raises(RarefyError, match=r"loggers has .*objects of a subclass of Logger"):
        Dispatcher(None, [], [Callback()])  # type: ignore[list-item]


def test_backend_is_another_word_for_the_device(caplog: pytest.LogCaptureFixture) -> None:
    assert session_builder.device_of("auto", "CPU") == "CPU"
    assert session_builder.device_of("auto", {"backend_type": "GPU"}) == "GPU"
    assert session_builder.device_of("cpu", None, autorestart=None) == "cpu"
    assert not caplog.records
    assert session_builder.device_of("cpu", None, {"max_num_restarts": 3}) == "cpu"
    assert "autorestart: ignored; run the same program again" in caplog.text


@pytest.mark.parametrize(("device", "backend"), [("cpu", "CPU"), ("auto", 3), ("auto", {})])
def test_a_backend_that_is_none(device: str, backend: Any) -> None:
    with pytest.raises(ConfigError, match="backend: "):
        session_builder.device_of(device, backend)
