"""A Lightning module trained sparse, with `lightning` or `pytorch_lightning`: pip install 'rarefy[lightning]'."""

import pytorch_lightning as lightning
import torch

import rarefy
from rarefy.integrations.lightning import SparsityCallback


class Unroll(lightning.LightningModule):
    """Learns to turn a rolled vector back."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16))

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        """The loss of one batch."""
        return torch.nn.functional.mse_loss(self.net(batch.roll(1, dims=1)), batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimizer, as in any Lightning module."""
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


def main(folder: str = "model_dir/lightning_trainer", steps: int = 60) -> float:
    """Trains, and returns the measured sparsity."""
    sparsity = SparsityCallback({"algorithm": "rigl", "sparsity": 0.8, "update": {"freq": 10, "stop": "75%"}})
    trainer = lightning.Trainer(
        max_steps=steps, callbacks=[sparsity], accelerator="cpu", logger=False, default_root_dir=folder
    )
    data = torch.utils.data.DataLoader(torch.randn(320, 16), batch_size=32)  # type: ignore[arg-type]
    trainer.fit(Unroll(), data)  # ckpt_path=... goes on from a checkpoint, masks and all
    table = rarefy.summary(sparsity.sparsity)
    print(table)
    return table.actual_sparsity


if __name__ == "__main__":
    main()
