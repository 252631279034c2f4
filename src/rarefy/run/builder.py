"""From a checked configuration to a trainer and its data."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from rarefy import filters
from rarefy.algorithms.base import Sparsifier
from rarefy.callbacks.events import Callback
from rarefy.callbacks.registry import DEFAULTS, Kind, build_callbacks
from rarefy.config import configure
from rarefy.data.registry import build_dataloader
from rarefy.data.sharding import shard
from rarefy.distributed import place
from rarefy.errors import ConfigError, RarefyError
from rarefy.models.registry import build_model
from rarefy.optim.optimizers import build_optimizer
from rarefy.optim.schedulers import SchedulerFactory, first_learning_rate, read_schedulers
from rarefy.run.file_keys import DataBlock, FitBlock
from rarefy.run.from_hf import take_over
from rarefy.run.model_zoo import is_for_cerebras
from rarefy.run.schema import TrainerConfig
from rarefy.trainer.feed import batches_in
from rarefy.trainer.plan import VERBOSE, LoopConfig, plan_run
from rarefy.trainer.session_builder import resolve_device
from rarefy.trainer.trainer import Trainer
from rarefy.validation import shorten

log = logging.getLogger("rarefy")


def check_tokens(model: nn.Module, data: Iterable[Any], path: str) -> None:
    """Refuses data with token ids outside of the model's vocabulary.

    Nothing is checked where either side does not tell: the model by `config.vocab_size`, the data by a data set
    with a method `largest_token`.

    Args:
        model: the model that will see the data.
        data: a loader.
        path: where the loader stands in the user's file.

    Raises:
        ConfigError: an id is too large.

    Example:
        >>> check_tokens(nn.Linear(2, 2), [], "fit.train_dataloader")
    """
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    tell = getattr(getattr(data, "dataset", None), "largest_token", None)
    largest = tell() if tell is not None and isinstance(vocabulary, int) else None
    if largest is not None and largest >= vocabulary:
        given = f"data with the token id {largest}"
        allowed = f"ids below the model's vocab_size, {vocabulary}, or a larger vocab_size"
        raise ConfigError(path, given, allowed, f"vocab_size: {largest + 1}")


@dataclass(frozen=True)
class Builder:
    """Builds the parts of one configuration, each at most once; every fault has its path in the file.

    A trainer takes the sparsity and the callbacks over, so a builder makes one trainer; a second one takes a second
    builder.

    Args:
        config: the checked configuration.
        base_dir: the folder of its file, where `./file.py:Name` is looked up.
        allow_imports: whether import paths may be followed.
    """

    config: TrainerConfig
    base_dir: Path
    allow_imports: bool = True

    @property
    def path(self) -> str:
        """Where `init` stands in the file."""
        return f"{self.config.path}.init"

    @property
    def _imports(self) -> dict[str, Any]:
        return {"base_dir": self.base_dir, "allow_imports": self.allow_imports}

    @property
    def fit_block(self) -> FitBlock:
        """The `fit` block.

        Raises:
            ConfigError: there is none.
        """
        if self.config.fit is None:
            example = "fit: {train_dataloader: {...}}"
            raise ConfigError(
                f"{self.config.path}.fit", "a missing value", "it, there is no run without it", example
            )
        return self.config.fit

    def data(self, block: DataBlock, path: str) -> Iterable[Any]:
        """The loader of a dataloader block.

        Args:
            block: the block.
            path: where it stands below the trainer, such as `fit.train_dataloader`.

        Raises:
            ConfigError: an unknown processor, an option that it does not take, or data that cannot be used.
        """
        where = f"{self.config.path}.{path}"
        seed = self.config.init.seed
        return build_dataloader(block.options, path=where, default_seed=seed, **self._imports)

    def several_data(self, blocks: Sequence[DataBlock], path: str) -> list[Iterable[Any]]:
        """The loaders of a list of dataloader blocks."""
        if len(blocks) == 1:
            return [self.data(blocks[0], path)]
        return [self.data(block, f"{path}[{index}]") for index, block in enumerate(blocks)]

    @cached_property
    def train_data(self) -> Iterable[Any]:
        """The loader of `fit.train_dataloader`, of several processes the share of this one.

        Raises:
            ConfigError: as for `data`, or there is no `fit` block.
            RarefyError: processes cannot share this loader.
        """
        path = "fit.train_dataloader"
        whole = self.data(self.fit_block.train_dataloader, path)
        rank, processes = place()
        if processes == 1:
            return whole
        try:
            # Without a seed too all processes must draw one order.
            return shard(whole, rank, processes, seed=self.config.init.seed or 0)
        except RarefyError as error:
            raise RarefyError(f"{self.config.path}.{path}: {error}") from error

    @cached_property
    def fit_validations(self) -> list[Iterable[Any]]:
        """The loaders of `fit.val_dataloader`; each of several processes validates on all of it."""
        return self.several_data(self.fit_block.val_dataloader, "fit.val_dataloader")

    @cached_property
    def total_steps(self) -> int:
        """Optimizer steps of the run from its very beginning.

        Raises:
            ConfigError: neither the file nor its data tells the length of the run.
        """
        return self.steps_with(self.config.init.loop or LoopConfig())

    def steps_with(self, loop: LoopConfig) -> int:
        """Optimizer steps of a run of this data with a certain `loop` block.

        Raises:
            ConfigError: as for `total_steps`.
        """
        # Opening the data may take long, and is only needed where an epoch's length is to be counted.
        batches = None if loop.tells_its_length else batches_in(self.train_data)
        per_epoch = None if batches is None else math.ceil(batches / loop.grad_accum_steps)
        try:
            return plan_run(loop, 0, per_epoch, 1, None).stop
        except ConfigError as error:
            raise error.under(self.path) from None

    @cached_property
    def sparsity(self) -> Sparsifier | None:
        """The sparsity of the run, to be applied to one model; None for a dense run.

        Raises:
            ConfigError: anything in the block that is not allowed.
        """
        init = self.config.init
        if init.sparsity is None:
            return None
        loop = init.loop or LoopConfig()
        # Without data to train on, nobody can count the steps of an epoch.
        num_steps = loop.total_steps() if self.config.fit is None else self.total_steps
        path = f"{self.path}.sparsity"
        sparsity = configure(init.sparsity, num_steps=num_steps, seed=init.seed, path=path, **self._imports)
        if init.model.from_hf is not None and any(one.scaling for one in sparsity.algorithms):
            given = "supar beside model.from_hf, whose weights are trained already"
            raise ConfigError(f"{path}.parametrization", given, "standard, or a model without from_hf")
        return sparsity

    @cached_property
    def schedulers(self) -> list[SchedulerFactory]:
        """The learning-rate schedulers, to be called with the optimizer."""
        given = self.config.init.schedulers
        return read_schedulers(given, f"{self.path}.schedulers", **self._imports) if given else []

    def optimizer(self, model: nn.Module) -> Optimizer:
        """The optimizer of a model; its learning rate may come from the schedulers.

        Raises:
            ConfigError: no optimizer in the file, or one that is not allowed.
        """
        path = f"{self.path}.optimizer"
        if self.config.init.optimizer is None:
            example = "optimizer: {AdamW: {lr: 1.0e-3}}"
            raise ConfigError(path, "a missing value", "an optimizer to train with", example)
        rate = first_learning_rate(self.schedulers) if self.schedulers else None
        densities = {} if self.sparsity is None else self.sparsity.densities
        more = {"learning_rate": rate, "densities": densities, **self._imports}
        return build_optimizer(self.config.init.optimizer, model, path, **more)

    def model(self, *, starts: bool = True) -> nn.Module:
        """The model.

        Args:
            starts: False leaves the weights of `from_hf` alone, because others come.

        Raises:
            ConfigError: an unknown model, options that it does not take, or weights that are not its own.
        """
        block = self.config.init.model
        path = f"{self.path}.model"
        try:
            model = build_model({"name": block.name, **block.options}, path=path, **self._imports)
            if block.from_hf is not None and starts:
                take_over(model, block.from_hf, f"{path}.from_hf")
            return model
        except RarefyError:
            raise
        # A constructor of the user's own may raise anything on options that do not suit it.
        except Exception as error:
            reason = shorten(str(error), limit=200)
            raise ConfigError(path, f"{block.name} with these options ({reason})", "others") from error

    @cached_property
    def callbacks(self) -> list[Any]:
        """The callbacks, defaults included."""
        return self._watchers("callbacks")

    @cached_property
    def loggers(self) -> list[Any]:
        """The loggers, defaults included."""
        return self._watchers("loggers")

    def _watchers(self, kind: Kind) -> list[Any]:
        entries = getattr(self.config.init, kind)
        path = f"{self.path}.{kind}"
        # A file for another system cannot know what is installed here.
        is_foreign = is_for_cerebras(self.config.content.get("init"))
        options = {"kind": kind, "leaves_out_missing": is_foreign, **self._imports}
        return build_callbacks(entries, DEFAULTS[kind], path=path, **options)

    @cached_property
    def device(self) -> torch.device:
        """Where the model is to compute.

        Raises:
            ConfigError: a GPU where there is none.
        """
        try:
            return resolve_device(self.config.init.requested_device)
        except ConfigError as error:
            raise error.under(self.path) from None

    def check(self) -> None:
        """Builds what needs neither data nor model, so that its faults are found at once.

        Raises:
            ConfigError: anything in these parts of the file that is not allowed.
        """
        _ = self.device, self.schedulers, self.callbacks, self.loggers
        # Percentages need the length of the run, and to count an epoch the data would have to be opened.
        if (self.config.init.loop or LoopConfig()).tells_its_length:
            _ = self.sparsity

    def trainer(
        self, *, trains: bool = True, more_callbacks: Sequence[Callback] = (), quiet: bool = False
    ) -> Trainer:
        """The trainer, with its sparsity applied.

        Args:
            trains: False leaves optimizer and schedulers out.
            more_callbacks: called after those of the file.
            quiet: True leaves the loggers out.

        Raises:
            ConfigError: anything in the file that is not allowed.
        """
        init = self.config.init
        trainer = Trainer(
            model_dir=init.model_dir,
            # A function, so that the trainer sets the seed before weights are drawn.
            model=self.model,
            device=self.device,
            optimizer=self.optimizer if trains else None,
            schedulers=self.schedulers if trains else None,
            precision=init.precision,
            sparsity=self.sparsity,
            parallel=init.parallel,
            loop=init.loop,
            checkpoint=init.checkpoint,
            logging=init.logging,
            callbacks=[*self.callbacks, *more_callbacks],
            loggers=[] if quiet else self.loggers,
            seed=init.seed,
            params=self.config.as_params,
        )
        tell_filter(trainer.model, self.sparsity)
        return trainer


def tell_filter(model: nn.Module, sparsity: Sparsifier | None) -> None:
    """Says for every parameter, at level VERBOSE, whether it became sparse."""
    algorithms = sparsity.algorithms if sparsity is not None else []
    sparse = {name for algorithm in algorithms for name in algorithm.parameters}
    for candidate in filters.candidates(model) if algorithms else ():
        matched = "matched" if candidate.name in sparse else "did not match"
        log.log(VERBOSE, "Sparsity filter %s: %s", matched, candidate.name)
