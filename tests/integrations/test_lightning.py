"""Lightning: the same masks and losses as the plain loop, resume through `ckpt_path`, manual optimization."""

from __future__ import annotations

import csv
import logging
from pathlib import Path

import pytest
import torch
from torch import nn

import rarefy
from helpers import assert_exact_zeros, assert_identical, batch, small_model, snapshot, sparse_parameters
from rarefy.errors import RarefyError

lightning = pytest.importorskip("pytorch_lightning")

from rarefy.integrations.lightning import SparsityCallback  # noqa: E402

STEPS = 30
STATIC = {"sparsity": 0.75, "seed": 3}
RIGL = {"algorithm": "rigl", "sparsity": 0.75, "seed": 3, "update": {"freq": 3, "stop": 25}}
COMPACT = {"compute": "compact", "param_filter": ["*0.weight", "*7.weight"]}
COMPACTS = {"static, compact": {**STATIC, **COMPACT}, "rigl, compact": {**RIGL, **COMPACT}}
SPARSITY = {**COMPACTS, "static": STATIC, "rigl": RIGL}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


class Steps:
    """One batch of the plain loop after the other, in `count` pieces each; goes on where it stopped."""

    def __init__(self, count):
        self.batches = [piece for step in range(STEPS) for piece in batch(step).chunk(count)]
        self.position = 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.losses = small_model(), []

    def loss(self, inputs):
        loss = (self.net(inputs) - 1).square().mean()
        self.losses.append(float(loss.detach()))
        return loss

    def training_step(self, inputs, index):
        return self.loss(inputs)

    def test_step(self, inputs, index):
        self.loss(inputs)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, STEPS)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Manual(Module):
    """Two optimizers, one for the first layer and one for the rest, stepped by hand every second batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, inputs, index):
        self.manual_backward(self.loss(inputs) / 2)
        if index % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        return optimizers_of(self.net)


def optimizers_of(net):
    first, *others = net.parameters()
    return torch.optim.SGD([first], lr=0.1, momentum=0.9), torch.optim.AdamW(others, lr=1e-2)


@pytest.fixture(autouse=True)
def quiet(caplog):
    caplog.set_level(logging.ERROR, logger="pytorch_lightning")


def fit(module, callback, folder, *, data=1, ckpt_path=None, logger=False, **options):
    settings = {"max_steps": STEPS, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    settings |= {"enable_model_summary": False, "log_every_n_steps": 10, "gradient_clip_val": 0.5, **options}
    saving = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=15, save_top_k=-1)
    callbacks = [callback, saving]
    trainer = lightning.Trainer(**settings, callbacks=callbacks, logger=logger, default_root_dir=folder)
    trainer.fit(module, Steps(data), ckpt_path=ckpt_path)
    return trainer


def plain_loop(config, optimizers, accumulate=1, clip=0.5):
    module = Module()
    sparsity = rarefy.configure(config)
    sparsity.apply(module)
    found = optimizers(module)
    for optimizer in found:
        sparsity.apply(optimizer)
    scheduler = torch.optim.lr_scheduler.LinearLR(found[0], 1.0, 0.1, STEPS) if clip else None
    for step in range(STEPS):
        for piece in batch(step).chunk(accumulate):
            (module.loss(piece) / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        for optimizer in found:
            optimizer.step()
            optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return module, sparsity


def one_optimizer(module):
    return (torch.optim.AdamW(module.parameters(), lr=1e-2),)


def masks_of(sparsity):
    return {parameter.name: parameter.mask.clone() for parameter in sparse_parameters(sparsity)}


def assert_same_run(module, sparsity, other, other_sparsity):
    assert module.losses == pytest.approx(other.losses, rel=1e-5)
    assert_identical(masks_of(sparsity), masks_of(other_sparsity))
    assert sparsity.step == other_sparsity.step == STEPS


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", SPARSITY)
def test_the_trainer_does_what_the_plain_loop_does(name, accumulate, tmp_path):
    module, callback = Module(), SparsityCallback(SPARSITY[name])
    trainer = fit(module, callback, tmp_path, data=accumulate, accumulate_grad_batches=accumulate)
    expected = plain_loop(SPARSITY[name], one_optimizer, accumulate)
    assert_same_run(module, callback.sparsity, *expected)
    assert_exact_zeros(callback.sparsity, trainer.optimizers[0])


def test_manual_optimization_with_two_optimizers(tmp_path):
    module, callback = Manual(), SparsityCallback(RIGL)
    trainer = fit(module, callback, tmp_path, data=2, max_steps=2 * STEPS, gradient_clip_val=None)
    expected = plain_loop(RIGL, lambda other: optimizers_of(other.net), accumulate=2, clip=None)
    assert_same_run(module, callback.sparsity, *expected)
    for optimizer in trainer.optimizers:
        assert_exact_zeros(callback.sparsity, optimizer)


@pytest.mark.parametrize("name", SPARSITY)
def test_a_resumed_run_is_the_uninterrupted_run(name, tmp_path):
    """Step 15 is an update step: connections that were just grown are zero, and active."""
    whole, first = Module(), SparsityCallback(SPARSITY[name])
    trainer = fit(whole, first, tmp_path)
    module, second = Module(), SparsityCallback({**SPARSITY[name], "seed": 99})
    resumed = fit(module, second, tmp_path, ckpt_path=tmp_path / "step=15.ckpt")
    assert module.losses == whole.losses[15:]
    for one, other in zip(trainer.optimizers, resumed.optimizers, strict=True):
        assert_identical(snapshot(whole, one), snapshot(module, other))
    assert second.sparsity.step == STEPS
    assert_exact_zeros(second.sparsity, resumed.optimizers[0])


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used")
def test_a_checkpoint_is_tested_by_a_fresh_module(tmp_path):
    trained = Module()
    fit(trained, SparsityCallback(RIGL), tmp_path, max_steps=15)
    module, callback = Module(), SparsityCallback({**RIGL, "seed": 99})
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    trainer = lightning.Trainer(accelerator="cpu", callbacks=[callback], **quiet)
    trainer.test(module, Steps(1), ckpt_path=tmp_path / "step=15.ckpt", verbose=False)
    assert len(module.losses) == STEPS
    assert_identical(dict(module.state_dict()), dict(trained.state_dict()))


def test_a_checkpoint_loads_as_weights_only(tmp_path):
    fit(Module(), SparsityCallback(RIGL), tmp_path, max_steps=15)
    saved = torch.load(tmp_path / "step=15.ckpt", weights_only=True)
    assert saved["callbacks"]["SparsityCallback"]["sparsity"]["step"] == 15
    assert "net.0.weight_mask" in saved["state_dict"]


def test_bfloat16(tmp_path):
    module, callback = Module(), SparsityCallback(RIGL)
    trainer = fit(module, callback, tmp_path, precision="bf16-mixed")
    assert callback.sparsity.step == STEPS and module.losses[-1] < module.losses[0]
    assert_exact_zeros(callback.sparsity, trainer.optimizers[0])


def test_a_second_fit_goes_on_and_another_module_begins_anew(tmp_path):
    callback, module, other = SparsityCallback(RIGL), Module(), Module()
    fit(module, callback, tmp_path, max_steps=3)
    sparsity = callback.sparsity
    fit(module, callback, tmp_path, max_steps=2)
    assert callback.sparsity is sparsity and sparsity.step == 5
    fit(other, callback, tmp_path, max_steps=2)
    assert callback.sparsity.step == 2 and sparsity.step == 5


@pytest.mark.parametrize("every_parameter", [False, True])
def test_sparsity_is_in_the_logs(every_parameter, tmp_path):
    callback = SparsityCallback(RIGL, log_parameters=every_parameter)
    logger = lightning.loggers.CSVLogger(tmp_path)
    fit(Module(), callback, tmp_path, logger=logger, data=2, accumulate_grad_batches=2)
    logger.save()
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").read_text().splitlines()))
    assert [row["step"] for row in rows] == ["10", "20", "30"]
    assert all(row["sparsity/net.*/target"] == row["sparsity/model/actual"] == "0.75" for row in rows)
    assert ("sparsity/net.0.weight/actual" in rows[0]) == every_parameter


def test_percentages_take_max_steps_of_the_trainer(tmp_path):
    callback = SparsityCallback({"algorithm": "set", "sparsity": 0.75, "update": {"freq": 2, "stop": "50%"}})
    fit(Module(), callback, tmp_path, max_steps=8)
    assert [callback.sparsity.update_schedule(step) for step in (2, 4)] == [True, False]


def test_a_callback_without_a_trainer():
    with pytest.raises(RarefyError, match="give it to a Trainer"):
        SparsityCallback(RIGL).state_dict()
