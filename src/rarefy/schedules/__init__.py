"""Numbers that change with the step, and the steps on which a topology may change."""

from rarefy.schedules.updates import (
    AtSteps,
    EveryNSteps,
    UpdateSchedule,
    WhenTrue,
    next_update,
    parse_update_schedule,
    step_keys,
    update_steps,
)
from rarefy.schedules.values import (
    SCHEDULES,
    Clamped,
    Constant,
    Cosine,
    Cycling,
    Exp,
    FromFunction,
    Linear,
    Polynomial,
    Power,
    Schedule,
    parse_schedule,
)

__all__ = [
    "SCHEDULES",
    "AtSteps",
    "Clamped",
    "Constant",
    "Cosine",
    "Cycling",
    "EveryNSteps",
    "Exp",
    "FromFunction",
    "Linear",
    "Polynomial",
    "Power",
    "Schedule",
    "UpdateSchedule",
    "WhenTrue",
    "next_update",
    "parse_schedule",
    "parse_update_schedule",
    "step_keys",
    "update_steps",
]
