"""Callbacks and loggers: what watches a training run without being part of it."""

from rarefy.callbacks.compute_norm import ComputeNorm
from rarefy.callbacks.csv_logger import CSVLogger
from rarefy.callbacks.events import Callback, Logger
from rarefy.callbacks.log_sparsity import LogSparsity
from rarefy.callbacks.progress_logger import ProgressLogger
from rarefy.callbacks.run_record import RunRecord
from rarefy.callbacks.tensorboard_logger import TensorBoardLogger

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
