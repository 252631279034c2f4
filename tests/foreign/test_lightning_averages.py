"""Averages that Lightning takes of weights, and writes back into the model at the end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import rarefy
from foreign.networks import SET, STATIC, loss_of, network
from rarefy.errors import RarefyError

pl: Any = pytest.importorskip("pytorch_lightning")
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = network()

    def training_step(self, batch, index):
        return (self.net(batch[0]) - 1).square().mean()

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Watch(pl.Callback):
    def __init__(self):
        self.seen = []

    def on_train_epoch_start(self, trainer, module):
        self.seen.append(module.net[0].weight.detach() * 1.0)


def fit(block, compute, *callbacks):
    from rarefy.integrations.lightning import SparsityCallback

    pl.seed_everything(0, verbose=False)
    module, watch = Module(), Watch()
    callback = SparsityCallback({**block, "compute": compute, "seed": 0})
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(32, 32)), batch_size=16)
    trainer = pl.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback, watch, *callbacks],
    )  # fmt: skip
    trainer.fit(module, data)
    mean = torch.stack([torch.as_tensor(seen) for seen in watch.seen[1:]]).mean(0)
    return module, callback.sparsity, mean


def averaging():
    return pl.callbacks.StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)


@pytest.mark.parametrize(
    ("block", "compute"), [(STATIC, "masked"), (STATIC, "compact"), (STATIC, "auto"), (SET, "masked")]
)
def test_the_average_is_that_by_hand(block, compute):
    module, sparsity, mean = fit(block, compute, averaging())
    weight = torch.as_tensor(module.net[0].weight.detach() * 1.0)
    mask = sparsity.parameters["net.0.weight"].mask
    torch.testing.assert_close(weight[mask], mean[mask], rtol=1e-4, atol=1e-6)
    assert rarefy.summary(sparsity).rows[0].kept == int((mask | (weight != 0)).sum())
    if block is STATIC:
        assert not weight[~mask].any()
    loss_of(module.net)


def test_an_average_of_several_topologies_is_not_written_into_a_compact_model():
    with pytest.raises(RarefyError, match="other connections is not allowed in a write to a weight"):
        fit(SET, "compact", averaging())
