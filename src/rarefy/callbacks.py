"""The callbacks and loggers of the trainer, under a short name: `from rarefy.callbacks import LogSparsity`."""

from rarefy.training.callbacks import (
    Callback,
    ComputeNorm,
    CSVLogger,
    Logger,
    LogSparsity,
    ProgressLogger,
    RunRecord,
    TensorBoardLogger,
)

__all__ = [
    "CSVLogger",
    "Callback",
    "ComputeNorm",
    "LogSparsity",
    "Logger",
    "ProgressLogger",
    "RunRecord",
    "TensorBoardLogger",
]
