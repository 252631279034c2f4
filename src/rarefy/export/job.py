"""What an export starts from, and the model built again from its run's configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from rarefy.checkpoint.error import CheckpointError
from rarefy.checkpoint.matching import match_model
from rarefy.checkpoint.saved_model import SavedModel
from rarefy.errors import ConfigError, RarefyError
from rarefy.run.builder import Builder
from rarefy.run.schema import parse, read_file

Fill = Callable[[Path], object]


@dataclass(frozen=True)
class Job:
    """One export.

    Args:
        saved: the trained model.
        params: the file of its run, from whose folder `./file.py:Name` is looked up; None takes the
            configuration in the checkpoint, and the working directory.
        allow_imports: whether import paths in the configuration may be followed.
    """

    saved: SavedModel
    params: Path | None = None
    allow_imports: bool = True

    @cached_property
    def builder(self) -> Builder:
        """What builds the parts of the run; in a file of several trainers, of the first.

        Raises:
            RarefyError: there is no configuration, or one that is not allowed.
        """
        content = self.saved.params if self.params is None else read_file(self.params)
        if not content:
            problem = "does not say how its model is built"
            raise CheckpointError(self.saved.path, problem, "give the file of its run: --params PARAMS.yaml")
        base_dir = Path() if self.params is None else self.params.parent
        return Builder(parse(content)[0], base_dir, self.allow_imports)

    def model(self) -> nn.Module:
        """The dense model with exact zeros, in eval mode, on the CPU.

        Raises:
            RarefyError: it cannot be built, or the weights are of another model.
        """
        model = self._built().eval()
        # Before `load_state_dict`, whose message lists every tensor.
        difference = match_model(model.state_dict(), self.saved.dense)
        if difference:
            remedy = "give the file of the run that made it: --params PARAMS.yaml"
            raise CheckpointError(self.saved.path, difference.problem(), remedy)
        model.load_state_dict(self.saved.dense)
        return model

    def batch(self) -> Any:
        """The first batch of the run's training data.

        Raises:
            RarefyError: the configuration has none, or it cannot be read.
        """
        fit = self.builder.config.fit
        path = "fit.train_dataloader"
        if fit is None:
            where = f"{self.builder.config.path}.{path}"
            raise ConfigError(where, "a missing value", "it, since a batch shows what the model takes")
        for batch in self.training_data():
            return batch
        raise RarefyError(f"{path} has no batch that could show what the model takes; give other data")

    def training_data(self) -> Iterable[Any]:
        """The batches of the run's training data.

        Raises:
            ConfigError: the configuration has none.
        """
        fit = self.builder.fit_block
        return self.builder.data(fit.train_dataloader, "fit.train_dataloader")

    def _built(self) -> nn.Module:
        try:
            # Not with the weights of `from_hf`: the saved ones come.
            return self.builder.model(starts=False)
        except RarefyError as error:
            if self.params is not None:
                raise
            problem = f"its model cannot be built ({error})"
            raise CheckpointError(
                self.saved.path, problem, "or give --params with the file of its run"
            ) from error
