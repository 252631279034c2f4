"""The decoder that the examples train, and how any other model joins in.

A model is a `torch.nn.Module`. Its `forward(batch)` gets one batch as the data loader made it and
returns one of

- a scalar tensor: the loss,
- a pair `(loss, outputs)`,
- an object with `.loss`.

Everything else is optional:

- `eval_metrics() -> Metrics` makes a fresh accumulator for one validation; after each validation batch
  `update(outputs, batch)` gets what `forward` returned and the batch, and at the end `compute()` returns
  `{"eval/...": float}`. A model without it gets `eval/loss`, the mean of its losses.
- `check_batch(batch)` raises a `RarefyError` when the model cannot run on a batch, for example because of a
  token id outside the vocabulary. It reads the batch's values: call it before the batch moves to a device.

`isinstance(model, ReportsMetrics)` and `isinstance(model, ChecksBatch)` tell who offers what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rarefy.imports import on_first_use

if TYPE_CHECKING:
    from rarefy.decoder.decoder_config import GPTConfig
    from rarefy.decoder.weight_initializer import InitializerConfig
    from rarefy.models.gpt import GPTModel
    from rarefy.models.language_modeling import LanguageModelLoss, LanguageModelMetrics, LanguageModelOutput
    from rarefy.models.protocol import ChecksBatch, Metrics, ReportsMetrics
    from rarefy.models.registry import MODELS, build_model

__all__ = [
    "MODELS",
    "ChecksBatch",
    "GPTConfig",
    "GPTModel",
    "InitializerConfig",
    "LanguageModelLoss",
    "LanguageModelMetrics",
    "LanguageModelOutput",
    "Metrics",
    "ReportsMetrics",
    "build_model",
]

__getattr__ = on_first_use(
    {
        "ChecksBatch": "rarefy.models.protocol",
        "GPTConfig": "rarefy.decoder.decoder_config",
        "GPTModel": "rarefy.models.gpt",
        "InitializerConfig": "rarefy.decoder.weight_initializer",
        "LanguageModelLoss": "rarefy.models.language_modeling",
        "LanguageModelMetrics": "rarefy.models.language_modeling",
        "LanguageModelOutput": "rarefy.models.language_modeling",
        "MODELS": "rarefy.models.registry",
        "Metrics": "rarefy.models.protocol",
        "ReportsMetrics": "rarefy.models.protocol",
        "build_model": "rarefy.models.registry",
    }
)
