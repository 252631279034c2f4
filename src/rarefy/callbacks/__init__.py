"""Callbacks and loggers: what watches a training run without being part of it."""

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
