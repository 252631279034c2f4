"""Callbacks and loggers: what watches a training run without being part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.imports import on_first_use

if TYPE_CHECKING:
    from rarefy.callbacks.compute_norm import ComputeNorm
    from rarefy.callbacks.events import Callback, Logger
    from rarefy.callbacks.log_sparsity import LogSparsity
    from rarefy.callbacks.loggers.csv_logger import CSVLogger
    from rarefy.callbacks.loggers.mlflow_logger import MLFlowLogger
    from rarefy.callbacks.loggers.progress_logger import ProgressLogger
    from rarefy.callbacks.loggers.tensorboard_logger import TensorBoardLogger
    from rarefy.callbacks.loggers.wandb_logger import WandbLogger
    from rarefy.callbacks.run_record import RunRecord

__all__ = [
    "CSVLogger",
    "Callback",
    "ComputeNorm",
    "LogSparsity",
    "Logger",
    "MLFlowLogger",
    "ProgressLogger",
    "RunRecord",
    "TensorBoardLogger",
    "WandbLogger",
]

__getattr__ = on_first_use(
    {
        "CSVLogger": "rarefy.callbacks.loggers.csv_logger",
        "Callback": "rarefy.callbacks.events",
        "ComputeNorm": "rarefy.callbacks.compute_norm",
        "LogSparsity": "rarefy.callbacks.log_sparsity",
        "Logger": "rarefy.callbacks.events",
        "MLFlowLogger": "rarefy.callbacks.loggers.mlflow_logger",
        "ProgressLogger": "rarefy.callbacks.loggers.progress_logger",
        "RunRecord": "rarefy.callbacks.run_record",
        "TensorBoardLogger": "rarefy.callbacks.loggers.tensorboard_logger",
        "WandbLogger": "rarefy.callbacks.loggers.wandb_logger",
    }
)
