"""Callbacks and loggers: what watches a training run without being part of it."""

from rarefy.training.callbacks.compute_norm import ComputeNorm
from rarefy.training.callbacks.csv_logger import CSVLogger
from rarefy.training.callbacks.log_sparsity import LogSparsity
from rarefy.training.callbacks.progress_logger import ProgressLogger
from rarefy.training.callbacks.run_record import RunRecord
from rarefy.training.callbacks.tensorboard_logger import TensorBoardLogger
from rarefy.training.events import Callback, Logger

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
