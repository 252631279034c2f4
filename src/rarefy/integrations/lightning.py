"""Sparse training with Lightning, whether it is installed as `lightning` or as `pytorch_lightning`."""

from __future__ import annotations

from typing import Any

from torch import nn

from rarefy.algorithms.base import Sparsifier
from rarefy.config import configure
from rarefy.errors import RarefyError
from rarefy.imports import require
from rarefy.integrations.metrics import sparsity_metrics

PACKAGES = ("pytorch_lightning", "lightning.pytorch")
Callback: Any = require("lightning", *PACKAGES).Callback


class SparsityCallback(Callback):
    """Makes the module of a Lightning Trainer sparse.

    The masks are in the module's state dict, the state of the algorithms in the callback's part of the checkpoint.

    Args:
        config: a `sparsity:` block, or a ready-made algorithm; see `rarefy.configure`.
        num_steps: optimizer steps of the run, if `config` has percentages and the Trainer no `max_steps`.
        log_parameters: whether the sparsity of every single parameter is logged too.

    Raises:
        ConfigError: anything in `config` that is not allowed, once a Trainer begins.

    Example:
        >>> callback, module = SparsityCallback(0.9), nn.Linear(10, 10)
        >>> trainer = require("lightning", *PACKAGES).Trainer(logger=False, enable_checkpointing=False)
        >>> callback.setup(trainer, module, "fit")
        >>> int(module.weight_mask.sum())
        10
    """

    def __init__(self, config: Any, *, num_steps: int | None = None, log_parameters: bool = False) -> None:
        self.config = config
        self.num_steps = num_steps
        self.log_parameters = log_parameters
        self._sparsity: Sparsifier | None = None
        self._module: nn.Module | None = None
        self._logged = 0

    @property
    def sparsity(self) -> Sparsifier:
        """The algorithms, for `rarefy.summary` and hooks.

        Raises:
            RarefyError: no Trainer has begun yet.
        """
        if self._sparsity is None:
            raise RarefyError(
                "SparsityCallback has no model yet; give it to a Trainer as one of its callbacks"
            )
        return self._sparsity

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Makes the module sparse before a checkpoint is loaded and before the optimizers are built."""
        # Called for every stage: fit, validate, test.
        if pl_module is self._module:
            return
        num_steps = self.num_steps or (trainer.max_steps if trainer.max_steps > 0 else None)
        self._sparsity = configure(self.config, num_steps=num_steps)
        self.sparsity.apply(pl_module)
        self._module = pl_module

    def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Follows the optimizers, before their states are loaded."""
        for optimizer in trainer.optimizers:
            self.sparsity.apply(optimizer)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Logs the sparsity every `log_every_n_steps` optimizer steps."""
        step = trainer.global_step
        # With accumulated gradients several batches end at the same step.
        if step == self._logged or step % trainer.log_every_n_steps:
            return
        self._logged = step
        for logger in trainer.loggers:
            metrics = sparsity_metrics(self.sparsity, every_parameter=self.log_parameters)
            logger.log_metrics(metrics, step=step)

    def state_dict(self) -> dict[str, Any]:
        """The callback's part of a checkpoint."""
        return {"sparsity": self.sparsity.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from a checkpoint, whose masks the module has loaded already."""
        self.sparsity.load_state_dict(state_dict["sparsity"])
