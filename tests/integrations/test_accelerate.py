"""Accelerate: the same masks and losses as the plain loop, `save_state` and `load_state`, skipped steps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import rarefy
from helpers import assert_exact_zeros, assert_identical, batch, small_model, snapshot, sparse_parameters

accelerate = pytest.importorskip("accelerate")

from rarefy.errors import RarefyError  # noqa: E402
from rarefy.integrations.accelerate import sparsify, unwrapped_optimizer  # noqa: E402

STEPS = 30
STATIC = {"sparsity": 0.75, "seed": 3}
RIGL = {"algorithm": "rigl", "sparsity": 0.75, "seed": 3, "update": {"freq": 3, "stop": 25}}
GROUP = [{"algorithm": "rigl", "sparsity": 0.5, "param_filter": "0.*weight", "update": {"freq": 2}}, STATIC]
COMPACT = {"compute": "compact", "param_filter": ["*0.weight", "*7.weight"]}
COMPACTS = {"static, compact": {**STATIC, **COMPACT}, "rigl, compact": {**RIGL, **COMPACT}}
SPARSITY = {**COMPACTS, "static": STATIC, "rigl": RIGL, "group": GROUP}


@pytest.fixture(autouse=True)
def fresh_state():
    """Accelerate keeps its settings in shared state; each test begins without any."""
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()
    yield
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.state.GradientState._reset_state()


class Run:
    """A model and whatever trains it, through Accelerate or without it."""

    def __init__(self, config, accelerated=True, accumulate=1, sparse_first=True, precision="no"):
        self.accumulate, self.losses = accumulate, []
        self.model = small_model()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-2)
        self.scheduler = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.1, STEPS)
        self.accelerator = None
        if not accelerated:
            self.sparsity = rarefy.configure(config)
            self.sparsity.apply(self.model)
            self.sparsity.apply(self.optimizer)
            return
        settings = {"gradient_accumulation_steps": accumulate, "mixed_precision": precision}
        self.accelerator = accelerate.Accelerator(cpu=True, step_scheduler_with_optimizer=False, **settings)
        if sparse_first:
            self.sparsity = sparsify(self.accelerator, config, self.model, self.optimizer)
        prepared = self.accelerator.prepare(self.model, self.optimizer, self.scheduler)
        self.model, self.optimizer, self.scheduler = prepared
        if not sparse_first:
            self.sparsity = sparsify(self.accelerator, config, self.model, self.optimizer)

    def train(self, first=0, last=STEPS):
        step = self._accelerated_step if self.accelerator else self._plain_step
        self.losses += [step(number) for number in range(first, last)]
        return self

    def _plain_step(self, number):
        total = 0.0
        for piece in batch(number).chunk(self.accumulate):
            loss = (self.model(piece) - 1).square().mean() / self.accumulate
            loss.backward()
            total += float(loss.detach())
        nn.utils.clip_grad_norm_(self.model.parameters(), 0.5)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()
        return total

    def _accelerated_step(self, number):
        total = 0.0
        for piece in batch(number).chunk(self.accumulate):
            with self.accelerator.accumulate(self.model):
                loss = (self.model(piece) - 1).square().mean()
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total += float(loss.detach()) / self.accumulate
        self.scheduler.step()
        return total

    @property
    def masks(self):
        return {parameter.name: parameter.mask.clone() for parameter in sparse_parameters(self.sparsity)}


def assert_same(first, second):
    assert first.losses == pytest.approx(second.losses, rel=1e-5)
    assert_identical(first.masks, second.masks)
    assert {leaf.step for run in (first, second) for leaf in run.sparsity.algorithms} == {STEPS}


@pytest.mark.parametrize("sparse_first", [True, False])
@pytest.mark.parametrize("name", SPARSITY)
def test_a_prepared_loop_does_what_the_plain_loop_does(name, sparse_first):
    run = Run(SPARSITY[name], sparse_first=sparse_first)
    first = run.masks
    run.train()
    assert any(not torch.equal(mask, first[key]) for key, mask in run.masks.items()) == (
        not name.startswith("static")
    )
    assert_same(run, Run(SPARSITY[name], accelerated=False).train())
    assert_exact_zeros(run.sparsity, unwrapped_optimizer(run.optimizer))


@pytest.mark.parametrize("name", ["static", "rigl"])
def test_gradients_are_accumulated_as_in_the_plain_loop(name):
    run = Run(SPARSITY[name], accumulate=3).train()
    assert_same(run, Run(SPARSITY[name], accelerated=False, accumulate=3).train())


@pytest.mark.parametrize("name", SPARSITY)
def test_a_resumed_run_is_the_uninterrupted_run(name, tmp_path):
    """Step 15 is an update step: connections that were just grown are zero, and active."""
    whole = Run(SPARSITY[name]).train(last=15)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(first=15)
    other_seed = {**RIGL, "seed": 99} if name == "rigl" else SPARSITY[name]
    resumed = Run(other_seed)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.losses = whole.losses[:15]
    resumed.train(first=15)
    assert resumed.losses == whole.losses
    assert_identical(snapshot(whole.model, whole.optimizer), snapshot(resumed.model, resumed.optimizer))
    assert_same(whole, resumed)


def test_the_saved_state_loads_as_weights_only(tmp_path):
    run = Run(GROUP).train(last=3)
    run.accelerator.save_state(str(tmp_path))
    saved = torch.load(tmp_path / "custom_checkpoint_0.pkl", weights_only=True)
    assert [leaf["step"] for leaf in saved] == [3, 3]
    run.sparsity.load_state_dict(saved)


def test_bfloat16():
    run = Run(RIGL, precision="bf16").train()
    assert run.sparsity.step == STEPS and run.losses[-1] < run.losses[0]
    assert_exact_zeros(run.sparsity, unwrapped_optimizer(run.optimizer))


def test_a_step_that_the_scaler_skips_changes_nothing():
    """Accelerate's float16 needs a GPU, but its optimizer takes any scaler."""
    accelerate.Accelerator(cpu=True)
    run = Run({**RIGL, "update": {"freq": 1}}, accelerated=False)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    wrapped = accelerate.optimizer.AcceleratedOptimizer(run.optimizer, scaler=scaler)
    for number, poison in enumerate([1.0, float("inf"), 1.0]):
        before, masks = snapshot(run.model, run.optimizer), run.masks
        scaler.scale(run.model(batch(number)).square().mean() * poison).backward()
        wrapped.step()
        wrapped.zero_grad()
        assert wrapped.step_was_skipped == (poison != 1.0)
        if wrapped.step_was_skipped:
            assert_identical(before, snapshot(run.model, run.optimizer))
        else:
            assert any(not torch.equal(mask, masks[name]) for name, mask in run.masks.items())
    assert run.sparsity.step == 2


def test_under_fsdp2_prepare_comes_first():
    """Accelerate takes FSDP2 on other devices than the CPU only, so that one of its facts stands for it."""
    accelerator = accelerate.Accelerator(cpu=True)
    waiting = SimpleNamespace(is_fsdp2=True, unwrap_model=accelerator.unwrap_model)
    with pytest.raises(RarefyError) as caught:
        sparsify(waiting, 0.5, nn.Linear(8, 8))
    assert str(caught.value) == (
        "sparsify before accelerator.prepare is not allowed under FSDP2, which makes other parameters there; call "
        "model, optimizer = accelerator.prepare(model, optimizer) first"
    )
