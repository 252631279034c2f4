"""`compute: {compact: half}`: what it refuses, and that a weight keeps it whatever happens to its connections."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import nn

import rarefy
from helpers import assert_identical, sparse_parameters
from rarefy.errors import ConfigError
from rarefy.kernels import half_native, half_obstacle

HALF = {"compact": "half"}
needs_half = pytest.mark.skipif(bool(half_obstacle()), reason=half_obstacle())


def layers(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 96, dtype=dtype), nn.Tanh(), nn.Linear(96, 48, dtype=dtype))


def prepare(compute: Any = HALF, model: Any = None, **changes: Any) -> tuple[Any, Any, Any]:
    model = layers() if model is None else model
    options = {"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 2}, "seed": 1, "compute": compute}
    sparsity = rarefy.configure({**options, **changes})
    sparsity.apply(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    sparsity.apply(optimizer)
    return model, sparsity, optimizer


def learn(
    model: Any, optimizer: Any, steps: Iterable[int] = range(6), dtype: torch.dtype | None = torch.bfloat16
) -> dict[str, Any]:
    for step in steps:
        x = torch.randn(64, 48, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            y = model(x)
        (y.float() - x).square().mean().backward()
        optimizer.step()
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was done with tiles in float16."""
    calls: list[bool] = []
    for name in ("forward", "backward"):
        original = getattr(half_native, name)

        def call(*arguments: Any, original: Any = original) -> Any:
            found = original(*arguments)
            calls.append(found is not None)
            return found

        monkeypatch.setattr(half_native, name, call)
    return calls


# ---- the option ----


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"compact": "third"}, "sparsity.compute.compact: 'third' is not allowed; give half, or leave it at compute: "
         "compact (example: compute: {compact: half})"),
        ({"compact": None}, "sparsity.compute.compact: null is not allowed; give half, or leave it at compute: "
         "compact (example: compute: {compact: half})"),
        ({"masked": "half"}, "sparsity.compute: {'masked': 'half'} is not allowed; give {compact: half} "
         "(example: compute: {compact: half})"),
        ({}, "sparsity.compute: {} is not allowed; give {compact: half} (example: compute: {compact: half})"),
        ({"compact": "half", "tokens": 3}, "sparsity.compute: {'compact': 'half', 'tokens': 3} is not allowed; give "
         "{compact: half} (example: compute: {compact: half})"),
        ("half", "sparsity.compute: 'half' is not allowed; give auto, masked, compact or {compact: half} "
         "(example: compute: auto)"),
    ],
)  # fmt: skip
def test_other_forms_of_the_option(value: Any, message: str) -> None:
    with pytest.raises(ConfigError) as found:
        rarefy.configure({"algorithm": "static", "sparsity": 0.5, "compute": value})
    assert str(found.value) == message


def test_kernels_without_it_refuse_it_and_leave_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAREFY_KERNELS", "reference")
    model = layers()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ConfigError) as found:
        prepare(model=model)
    problem = f"half for 0.weight ({half_obstacle()})"
    assert str(found.value) == (
        f"sparsity.compute.compact: {problem} is not allowed; give compute: compact or auto (example: compute: compact)"
    )
    assert_identical(model.state_dict(), before)


@needs_half
def test_blocks_have_it_already() -> None:
    with pytest.raises(
        ConfigError, match="its blocks of 8 × 16 are multiplied in bfloat16 under autocast already"
    ):
        prepare(pattern={"block": [8, 16]})
    model, _, optimizer = prepare(pattern={"block": [2, 3]})  # stored by connections
    learn(model, optimizer)


@needs_half
def test_weights_in_another_dtype_have_no_use_for_it() -> None:
    with pytest.raises(ConfigError, match=r"it is torch\.bfloat16; under autocast weights are float32"):
        prepare(model=layers(torch.bfloat16))


def test_auto_never_takes_it() -> None:
    model, sparsity, optimizer = prepare("auto", sparsity=0.99)
    learn(model, optimizer)
    assert {one.storage.form for one in sparse_parameters(sparsity)} <= {"masked", "compact"}


# ---- training ----


@needs_half
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_those_of_float32_tiles(counted: list[bool], dtype: torch.dtype) -> None:
    gradients = []
    for compute in (HALF, "compact"):
        model, _, _ = prepare(compute, update={"freq": 9})
        with torch.autocast("cpu", dtype):
            y = model(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)))
        y.float().square().sum().backward()
        gradients.append([one.grad + 0.0 for one in model.parameters()])
    assert counted == [True] * 4
    for half, full in zip(*gradients, strict=True):
        assert float((half - full).norm() / full.norm()) < 1e-2


@needs_half
def test_without_autocast_it_is_compact(counted: list[bool]) -> None:
    model, _, optimizer = prepare()
    half = learn(model, optimizer, dtype=None)
    assert not any(counted)
    other, _, its_optimizer = prepare("compact")
    assert_identical(learn(other, its_optimizer, dtype=None), half)


@needs_half
def test_a_gradient_that_is_not_finite_is_what_it_is_with_float32_tiles(counted: list[bool]) -> None:
    for compute in (HALF, "compact"):
        model, _, _ = prepare(compute)
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.ones(64, 48))
        y.backward(torch.full_like(y, torch.inf))
        assert not bool(model[2].weight.grad.dense().isfinite().all())
    assert counted == [True, True, False, False]


@needs_half
def test_new_connections_loading_and_copies_keep_it(counted: list[bool]) -> None:
    model, sparsity, optimizer = prepare()
    state = learn(model, optimizer)
    assert model[0].weight.topology.half
    for assign in (False, True):
        model.load_state_dict(state, assign=assign)
        if assign:  # other parameters
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            sparsity.apply(optimizer)
        learn(model, optimizer, range(3))
        assert model[0].weight.topology.half and model[2].weight.topology.half
    counted.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(copy.deepcopy(model)(torch.ones(64, 48)), model(torch.ones(64, 48)))
    assert counted == [True] * 4
    assert sparsity.algorithms[0].updates > 2


@needs_half
def test_a_resumed_run_goes_on_bit_for_bit() -> None:
    model, sparsity, optimizer = prepare()
    learn(model, optimizer, range(3))
    saved = copy.deepcopy([one.state_dict() for one in (model, sparsity, optimizer)])
    whole = learn(model, optimizer, range(3, 7))
    parts = prepare()
    for one, state in zip(parts, saved, strict=True):
        one.load_state_dict(state)
    assert_identical(learn(parts[0], parts[2], range(3, 7)), whole)


@needs_half
@pytest.mark.parametrize(
    "computes", [(HALF, "compact"), ("compact", HALF), (HALF, "masked"), ("masked", HALF)]
)
def test_a_state_goes_into_other_storages(computes: tuple[Any, Any]) -> None:
    first = prepare(computes[0])
    state = learn(first[0], first[2], range(3))
    second = prepare(computes[1])
    for one, other in zip(second, first, strict=True):
        one.load_state_dict(other.state_dict())
    assert_identical(dict(second[0].state_dict()), state)
    learn(second[0], second[2], range(3, 6))
    rarefy.finalize(second[0])
    assert type(second[0][0].weight) is nn.Parameter


@needs_half
def test_a_compiled_model_computes_the_same(counted: list[bool]) -> None:
    model, _, optimizer = prepare()
    eager = learn(model, optimizer)
    other, _, its_optimizer = prepare()
    counted.clear()
    compiled = learn(torch.compile(other, backend="aot_eager"), its_optimizer)
    assert any(counted)
    assert_identical({name.removeprefix("_orig_mod."): one for name, one in compiled.items()}, eager)
