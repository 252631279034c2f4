"""How long a run is, and what falls due on which of its steps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictFloat,
    StrictInt,
    field_validator,
    model_validator,
)

from rarefy.errors import ConfigError
from rarefy.validation import StepCount


class LoopConfig(BaseModel):
    """`loop`: the length of the run, and how often it is validated.

    total = min of what is given among num_epochs · steps_per_epoch, num_steps, max_steps − global_step

    Args:
        num_steps: optimizer steps of this fit.
        max_steps: the global step at which to end, steps of earlier fits included.
        num_epochs: passes over the training data; not together with `num_steps`.
        steps_per_epoch: optimizer steps that count as one epoch; None counts the batches of the data.
        eval_steps: batches of one validation; None for all of them.
        eval_frequency: validate every so many steps (int), after every such part of the run (float in (0, 1],
            rounded up to whole steps), always at the end too; 0 or None for never.
        grad_accum_steps: batches per optimizer step; the last step of an epoch takes what is left.
        micro_batch_size: samples of a batch that are learnt at a time, with the same result as the whole batch in less
            memory; `auto` takes as many as fit into memory, None all of them.
        max_skipped_steps: stop after this many steps in a row without a finite gradient.

    Example:
        >>> LoopConfig(num_steps=100, eval_frequency=0.25).grad_accum_steps
        1
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    num_steps: StepCount | None = None
    max_steps: StepCount | None = None
    num_epochs: Annotated[
        int | None, Field(strict=True, ge=1, description="a whole number of epochs ≥ 1", examples=[3])
    ] = None
    steps_per_epoch: StepCount | None = None
    eval_steps: StepCount | None = None
    eval_frequency: Annotated[
        StrictInt | StrictFloat | None,
        Field(description="a whole number of steps, a part of the run in (0, 1], or null", examples=[0.5]),
    ] = 1.0
    grad_accum_steps: StepCount = 1
    micro_batch_size: Annotated[
        Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] | None,
        Field(description="a whole number of samples ≥ 1, auto or null", examples=[8]),
    ] = None
    max_skipped_steps: StepCount = 20

    @field_validator("eval_frequency")
    @classmethod
    def _check_frequency(cls, given: int | float | None) -> int | float | None:
        # 1 is every step, 1.0 the whole run.
        is_part = isinstance(given, float)
        if given is not None and not (given >= 0 and (given <= 1 or not is_part)):
            raise ValueError("a whole number of steps, a part of the run in (0, 1], or null")
        return given

    @model_validator(mode="after")
    def _check_together(self) -> LoopConfig:
        if self.num_epochs is not None and self.num_steps is not None:
            raise ConfigError(
                "num_epochs", f"{self.num_epochs} beside num_steps", "one of the two", "num_epochs: 3"
            )
        return self

    @property
    def tells_its_length(self) -> bool:
        """Whether `total_steps` needs no count of the data's batches.

        Example:
            >>> LoopConfig(num_epochs=2).tells_its_length
            False
        """
        if self.num_epochs is not None:
            return self.steps_per_epoch is not None
        return self.num_steps is not None or self.max_steps is not None

    def total_steps(self, start: int = 0, steps_per_epoch: int | None = None) -> int | None:
        """How many steps a fit takes that begins at global step `start`; not below 0.

        Args:
            start: the global step at which the fit begins.
            steps_per_epoch: used where the key of this name is absent.

        Returns:
            The number of steps; None if nothing that is given tells.
        """
        per_epoch = self.steps_per_epoch or steps_per_epoch
        limits = [] if self.num_steps is None else [self.num_steps]
        if self.num_epochs is not None and per_epoch is not None:
            limits.append(self.num_epochs * per_epoch)
        if self.max_steps is not None:
            limits.append(max(0, self.max_steps - start))
        return min(limits, default=None)


# The Model Zoo's level between DEBUG, 10, and INFO, 20, where Python has none.
VERBOSE = 15


def _upper(level: object) -> object:
    return level.upper() if isinstance(level, str) else level


class LoggingConfig(BaseModel):
    """`logging`: how often metrics are logged, and which messages are shown.

    Args:
        log_steps: metrics are logged every so many steps, and on the last one.
        log_level: the least important messages that are shown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    log_steps: StepCount = 10
    log_level: Annotated[
        Literal["DEBUG", "VERBOSE", "INFO", "WARNING", "ERROR", "CRITICAL"] | None,
        BeforeValidator(_upper),
        Field(description="DEBUG, VERBOSE, INFO, WARNING, ERROR or CRITICAL", examples=["INFO"]),
    ] = None


@dataclass(frozen=True)
class RunPlan:
    """The steps of one fit.

    Args:
        start: the global step at which the fit began, before any resume.
        stop: the global step at which it ends.
        eval_every: steps between two validations; None for none.
        log_every: steps between two logged steps.
        save_every: steps between two checkpoints; None for one at the end only.

    Example:
        >>> plan = RunPlan(start=0, stop=10, eval_every=4, log_every=5, save_every=None)
        >>> [step for step in range(11) if plan.validates_at(step)]
        [4, 8, 10]
    """

    start: int
    stop: int
    eval_every: int | None
    log_every: int
    save_every: int | None

    def validates_at(self, step: int) -> bool:
        """Whether a validation follows global step `step`."""
        # Nothing has been learnt before the first step.
        if self.eval_every is None or step == self.start:
            return False
        return step == self.stop or (step - self.start) % self.eval_every == 0

    def logs_at(self, step: int) -> bool:
        """Whether the metrics of global step `step` are logged."""
        return step == self.stop or step % self.log_every == 0

    def saves_at(self, step: int) -> bool:
        """Whether a checkpoint follows global step `step`."""
        return step == self.stop or (self.save_every is not None and step % self.save_every == 0)


def plan_run(
    loop: LoopConfig, start: int, steps_per_epoch: int | None, log_every: int, save_every: int | None
) -> RunPlan:
    """The plan of a fit that begins at global step `start`.

    Args:
        loop: the `loop` block.
        start: the global step at which the fit began.
        steps_per_epoch: optimizer steps in one pass over the data, if known.
        log_every: steps between two logged steps.
        save_every: steps between two checkpoints, or None.

    Returns:
        The plan; its `stop` equals `start` when there is nothing to do.

    Raises:
        ConfigError: the length of the run follows from nothing that is given.
    """
    total = loop.total_steps(start, steps_per_epoch)
    if total is None and loop.num_epochs is not None:
        problem = "num_epochs for data of unknown length without steps_per_epoch"
        raise ConfigError("loop", problem, "both, or num_steps", "steps_per_epoch: 1000")
    if total is None:
        raise ConfigError(
            "loop", "a run without a length", "num_steps, max_steps or num_epochs", "num_steps: 1000"
        )
    return RunPlan(start, start + total, _interval(loop.eval_frequency, total), log_every, save_every)


def _interval(frequency: int | float | None, total: int) -> int | None:
    if not frequency:
        return None
    return frequency if isinstance(frequency, int) else max(1, math.ceil(frequency * total))
