"""Norms of the gradients and of the parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rarefy.callbacks.events import Callback
from rarefy.callbacks.trainer_view import TrainerView
from rarefy.distributed import summed


class ComputeNorm(Callback):
    """Logs `model_wise_grad_norm`, `model_wise_params_norm`, `per_layer_grad_norm/<parameter>` on log steps.

    norm = sqrt(Σ x²), of the unscaled gradients before clipping, and of the parameters before the step.
    """

    def __init__(self) -> None:
        self._norms: dict[str, float] = {}

    def on_before_optimizer_step(self, trainer: TrainerView) -> None:
        """Measures while the gradients are whole."""
        if trainer.is_log_step:
            self._norms = measure_norms(dict(trainer.model.named_parameters()))

    def on_train_batch_end(self, trainer: TrainerView, metrics: dict[str, Any]) -> None:
        """Logs what was measured."""
        if self._norms:
            trainer.log_metrics_dict(self._norms)
            self._norms = {}


def measure_norms(parameters: Mapping[str, Tensor]) -> dict[str, float]:
    """Norms by metric name; only trainable parameters, and gradients where there are any.

    Args:
        parameters: tensors by name, with or without `.grad`.

    Example:
        >>> weight = torch.tensor([3.0, 4.0], requires_grad=True); weight.sum().backward()
        >>> measure_norms({"w": weight})["model_wise_params_norm"]
        5.0
    """
    trainable = {
        name: parameter.detach() for name, parameter in parameters.items() if parameter.requires_grad
    }
    gradients = {name: parameters[name].grad for name in trainable}
    per_parameter = _norms({name: grad for name, grad in gradients.items() if grad is not None})
    return {
        "model_wise_grad_norm": _total(per_parameter),
        "model_wise_params_norm": _total(_norms(trainable)),
        **{f"per_layer_grad_norm/{name}": norm for name, norm in per_parameter.items()},
    }


def _norms(tensors: Mapping[str, Tensor]) -> dict[str, float]:
    # On the CPU and in one dtype, or those of layers on several devices could not be stacked.
    norms = [
        summed(torch.linalg.vector_norm(tensor, dtype=_wide(tensor))).cpu().double()
        for tensor in tensors.values()
    ]
    return dict(zip(tensors, torch.stack(norms).tolist(), strict=True)) if norms else {}


def _wide(tensor: Tensor) -> torch.dtype:
    # A sum of squares in bfloat16 soon stops growing.
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _total(norms: Mapping[str, float]) -> float:
    return sum(norm**2 for norm in norms.values()) ** 0.5
