"""Learning-rate schedules in closed form: optimizer step k uses LR(k − 1).

A schedule is plain data; called with an optimizer it becomes a torch scheduler:

    schedulers=[CosineDecayLR(initial_learning_rate=1e-3, end_learning_rate=0, total_iters=1000)]
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rarefy.optim.optimizers import SCALE_KEY
from rarefy.torch_private import set_progress
from rarefy.validation import Number, StepCount

Rate = Annotated[
    float, Field(strict=True, ge=0, allow_inf_nan=False, description="a learning rate ≥ 0", examples=[0.001])
]


class ScheduledLR(LRScheduler):
    """Gives every parameter group of an optimizer the rate that a schedule has for the current step.

    A group's `adjust_learning_rate` multiplies it.

    Args:
        optimizer: whose learning rate is set, at once and in every `step()`.
        schedule: the schedule.
    """

    def __init__(self, optimizer: Optimizer, schedule: LRSchedule) -> None:
        # First, since torch's constructor asks for the rate of step 0.
        self.schedule = schedule
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """The rate of each parameter group at the current step."""
        rate = self.schedule.rate(self.last_epoch)
        return [rate * group.get(SCALE_KEY, 1.0) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The step; the schedule itself belongs to the configuration."""
        # torch's own would hold the schedule object as well, which no file of ours can.
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues at the step of a checkpoint, with the rate that the schedule has there."""
        self.last_epoch = state_dict["last_epoch"]
        rates = self.get_lr()
        set_progress(self, self.last_epoch, rates)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            # In place: compiled and capturable optimizers hold on to the tensor.
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate


class LRSchedule(BaseModel, ABC):
    """A learning rate as a function of the number of steps taken.

    Args:
        total_iters: the length of the schedule where it has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    total_iters: StepCount | None = None

    @abstractmethod
    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""

    def __call__(self, optimizer: Optimizer) -> ScheduledLR:
        """The torch scheduler that applies this schedule to `optimizer`."""
        return ScheduledLR(optimizer, self)


class ConstantLR(LRSchedule):
    """LR(t) = learning_rate.

    Args:
        learning_rate: the rate.
        total_iters: its length within a `SequentialLR`.

    Example:
        >>> ConstantLR(learning_rate=0.5).rate(10)
        0.5
    """

    learning_rate: Rate

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        return self.learning_rate


class _Decay(LRSchedule):
    """From an initial to an end rate in `total_iters` steps, constant afterwards."""

    initial_learning_rate: Rate
    end_learning_rate: Rate
    total_iters: StepCount  # type: ignore[assignment]

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        # The end rate itself, where the formula could miss it by a rounding.
        if step >= self.total_iters:
            return self.end_learning_rate
        share = self.remaining(step / self.total_iters)
        return self.end_learning_rate + (self.initial_learning_rate - self.end_learning_rate) * share

    @abstractmethod
    def remaining(self, done: float) -> float:
        """Which part of the way from the end rate is left when the part `done` of the steps is over."""


class LinearLR(_Decay):
    """LR(t) = end + (initial − end)(1 − t/T), end after T.

    Args:
        initial_learning_rate: the rate of the first step.
        end_learning_rate: the rate after `total_iters` steps.
        total_iters: T.

    Example:
        >>> LinearLR(initial_learning_rate=0.0, end_learning_rate=1.0, total_iters=4).rate(1)
        0.25
    """

    def remaining(self, done: float) -> float:
        """1 − t/T."""
        return 1.0 - done


class PolynomialLR(_Decay):
    """LR(t) = end + (initial − end)(1 − t/T)^power, end after T.

    Args:
        initial_learning_rate: the rate of the first step.
        end_learning_rate: the rate after `total_iters` steps.
        total_iters: T.
        power: the exponent.

    Example:
        >>> PolynomialLR(initial_learning_rate=1.0, end_learning_rate=0.0, total_iters=4, power=2.0).rate(2)
        0.25
    """

    power: Annotated[
        float, Field(gt=0, allow_inf_nan=False, description="a number above 0", examples=[2.0])
    ] = 1.0

    def remaining(self, done: float) -> float:
        """(1 − t/T)^power."""
        return (1.0 - done) ** self.power


class CosineDecayLR(_Decay):
    """LR(t) = end + (initial − end) · ½(1 + cos(π · min(t, T)/T)).

    Args:
        initial_learning_rate: the rate of the first step.
        end_learning_rate: the rate after `total_iters` steps.
        total_iters: T.

    Example:
        >>> round(CosineDecayLR(initial_learning_rate=1.0, end_learning_rate=0.5, total_iters=10).rate(5), 6)
        0.75

    Paper: Loshchilov & Hutter, SGDR, 1608.03983.
    """

    def remaining(self, done: float) -> float:
        """½(1 + cos(π t/T))."""
        return 0.5 * (1.0 + math.cos(math.pi * done))


class CosineAnnealingLR(LRSchedule):
    """LR(t) = min + (initial − min) · ½(1 + cos(π t/T_max)); rises again after T_max.

    Args:
        initial_learning_rate: the rate of the first step.
        T_max: half of the period, in steps.
        eta_min: the lowest rate.

    Example:
        >>> CosineAnnealingLR(initial_learning_rate=1.0, T_max=5).rate(10)
        1.0
    """

    initial_learning_rate: Rate
    T_max: StepCount
    eta_min: Rate = 0.0

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        share = 0.5 * (1.0 + math.cos(math.pi * step / self.T_max))
        return self.eta_min + (self.initial_learning_rate - self.eta_min) * share


class CosineAnnealingWarmRestarts(LRSchedule):
    """LR(t) = min + (initial − min) · ½(1 + cos(π · (t mod T_0)/T_0)).

    Args:
        initial_learning_rate: the rate of the first step and after each restart.
        T_0: steps between two restarts.
        eta_min: the lowest rate.

    Example:
        >>> CosineAnnealingWarmRestarts(initial_learning_rate=1.0, T_0=5).rate(10)
        1.0

    Paper: Loshchilov & Hutter, SGDR, 1608.03983.
    """

    initial_learning_rate: Rate
    T_0: StepCount
    eta_min: Rate = 0.0

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        share = 0.5 * (1.0 + math.cos(math.pi * (step % self.T_0) / self.T_0))
        return self.eta_min + (self.initial_learning_rate - self.eta_min) * share


class ExponentialLR(LRSchedule):
    """LR(t) = initial · decay_rate^(t/T), with ⌊t/T⌋ when `staircase`.

    Args:
        initial_learning_rate: the rate of the first step.
        decay_rate: the factor per `total_iters` steps.
        total_iters: T.
        staircase: whether the rate falls every T steps instead of every step.

    Example:
        >>> ExponentialLR(initial_learning_rate=1.0, decay_rate=0.5, total_iters=10).rate(20)
        0.25
    """

    initial_learning_rate: Rate
    decay_rate: Rate
    total_iters: StepCount  # type: ignore[assignment]
    staircase: bool = False

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        power = step // self.total_iters if self.staircase else step / self.total_iters
        return self.initial_learning_rate * self.decay_rate**power


class InverseExponentialTimeDecayLR(LRSchedule):
    """LR(t) = initial / (1 + decay_rate · t^step_exponent / T), with ⌊t^step_exponent / T⌋ when `staircase`.

    Args:
        initial_learning_rate: the rate of the first step.
        step_exponent: the exponent of the step.
        total_iters: T.
        decay_rate: how fast the rate falls.
        staircase: whether the rate falls in stairs.

    Example:
        >>> InverseExponentialTimeDecayLR(
        ...     initial_learning_rate=1.0, step_exponent=1, total_iters=10, decay_rate=1.0
        ... ).rate(10)
        0.5
    """

    initial_learning_rate: Rate
    step_exponent: Number
    total_iters: StepCount  # type: ignore[assignment]
    decay_rate: Rate
    staircase: bool = False

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        progress = step**self.step_exponent / self.total_iters
        return self.initial_learning_rate / (
            1.0 + self.decay_rate * (math.floor(progress) if self.staircase else progress)
        )


class InverseSquareRootDecayLR(LRSchedule):
    """LR(t) = initial · scale / √max(t, warmup_steps).

    Args:
        initial_learning_rate: a factor.
        scale: another factor.
        warmup_steps: the rate is constant for so many steps.

    Example:
        >>> InverseSquareRootDecayLR(initial_learning_rate=1.0, warmup_steps=4).rate(16)
        0.25
    """

    initial_learning_rate: Rate = 1.0
    scale: Rate = 1.0
    warmup_steps: StepCount = 1

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        return self.initial_learning_rate * self.scale / math.sqrt(max(step, self.warmup_steps))


class StepLR(LRSchedule):
    """LR(t) = initial · gamma^⌊t/step_size⌋.

    Args:
        initial_learning_rate: the rate of the first step.
        step_size: steps between two changes.
        gamma: the factor of each change.

    Example:
        >>> StepLR(initial_learning_rate=1.0, step_size=10, gamma=0.5).rate(25)
        0.25
    """

    initial_learning_rate: Rate
    step_size: StepCount
    gamma: Rate

    def rate(self, step: int) -> float:
        """The learning rate after `step` optimizer steps."""
        return self.initial_learning_rate * self.gamma ** (step // self.step_size)
