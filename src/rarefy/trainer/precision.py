"""Mixed precision, loss scaling and gradient clipping; the order is unscale → clip → step."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import Optimizer

from rarefy.distributed import summed
from rarefy.errors import ConfigError
from rarefy.storage.optimizer_traits import trained_parameters
from rarefy.torch_private import multiply_

_POSITIVE = Field(gt=0, allow_inf_nan=False, description="a number above 0", examples=[1.0])
_Switch = Annotated[bool, Field(strict=True, description="true or false", examples=["true"])]


class PrecisionConfig(BaseModel):
    """`precision`: the number formats of the forward pass, and how large gradients may be.

    Args:
        enabled: whether the forward pass runs under autocast.
        fp16_type: the 16-bit format; `cbfloat16` means `bfloat16`.
        loss_scaling_factor: a constant by which the loss is scaled for the backward pass, or `dynamic`; the
            dynamic scale is used for `float16` only, as `bfloat16` has the range of `float32`.
        initial_loss_scale: where the dynamic scale begins.
        steps_per_increase: the dynamic scale doubles after so many good steps.
        max_gradient_norm: gradients are scaled down to this norm over all parameters.
        max_gradient_value: gradients are clamped to ± this value; not together with `max_gradient_norm`.
        log_loss_scale: whether the loss scale is among the logged metrics.

    Example:
        >>> PrecisionConfig(fp16_type="cbfloat16", max_gradient_norm=1.0).dtype
        torch.bfloat16
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)

    enabled: _Switch = True
    fp16_type: Annotated[
        Literal["bfloat16", "cbfloat16", "float16"],
        Field(description="bfloat16, cbfloat16 or float16", examples=["bfloat16"]),
    ] = "bfloat16"
    loss_scaling_factor: Annotated[
        Annotated[float, _POSITIVE] | Literal["dynamic"],
        Field(description="a number above 0, or dynamic", examples=["dynamic"]),
    ] = 1.0
    initial_loss_scale: Annotated[float, _POSITIVE] = 65536.0
    steps_per_increase: Annotated[
        int, Field(strict=True, ge=1, description="a whole number of steps ≥ 1", examples=[2000])
    ] = 2000
    max_gradient_norm: Annotated[float | None, _POSITIVE] = None
    max_gradient_value: Annotated[float | None, _POSITIVE] = None
    log_loss_scale: _Switch = False

    @model_validator(mode="after")
    def _check_clipping(self) -> PrecisionConfig:
        if self.max_gradient_norm is not None and self.max_gradient_value is not None:
            problem = f"{self.max_gradient_value} beside max_gradient_norm"
            raise ConfigError("max_gradient_value", problem, "one of the two", "max_gradient_norm: 1.0")
        return self

    @property
    def dtype(self) -> torch.dtype:
        """The 16-bit format of the forward pass."""
        return torch.float16 if self.fp16_type == "float16" else torch.bfloat16


class Precision:
    """Applies a `PrecisionConfig` to the steps of a run.

    Args:
        config: what to do.
        device: where the model is.
    """

    def __init__(self, config: PrecisionConfig, device: torch.device) -> None:
        self.config = config
        self.device = device
        dynamic = config.loss_scaling_factor == "dynamic"
        self._constant = 1.0 if config.loss_scaling_factor == "dynamic" else config.loss_scaling_factor
        self.scaler: torch.amp.GradScaler | None = None
        if dynamic and config.enabled and config.dtype == torch.float16:
            self.scaler = torch.amp.GradScaler(
                device.type, init_scale=config.initial_loss_scale, growth_interval=config.steps_per_increase
            )

    @property
    def scale(self) -> float:
        """The factor on the loss in the next backward pass."""
        return self._constant if self.scaler is None else self.scaler.get_scale()

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of a forward pass."""
        if not self.config.enabled:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.config.dtype)

    def backward(self, loss: Tensor) -> None:
        """Backward pass of the scaled loss."""
        if self.scaler is not None:
            loss = self.scaler.scale(loss)
        elif self._constant != 1.0:
            loss = loss * self._constant
        loss.backward()

    def unscale(self, optimizer: Optimizer) -> None:
        """Takes the scale out of the gradients, in place."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)
        elif self._constant != 1.0:
            gradients = [p.grad for p in trained_parameters(optimizer) if p.grad is not None]
            multiply_(gradients, 1.0 / self._constant)

    def clip(self, optimizer: Optimizer, norm: Tensor) -> None:
        """Clips the gradients, whose norm over all parameters is `norm`."""
        if self.config.max_gradient_norm is not None:
            # `clip_grad_norm_` would compute the norm, which is known, once more.
            clip_grads_with_norm_(list(trained_parameters(optimizer)), self.config.max_gradient_norm, norm)
        elif self.config.max_gradient_value is not None:
            clip_grad_value_(list(trained_parameters(optimizer)), self.config.max_gradient_value)

    def step(self, optimizer: Optimizer) -> None:
        """One step of the optimizer with finite gradients."""
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def skip(self) -> None:
        """What takes the place of `step` when gradients are not finite: the dynamic scale shrinks."""
        if self.scaler is not None:
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """The state of the dynamic scale."""
        return {} if self.scaler is None else dict(self.scaler.state_dict())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up the dynamic scale of a checkpoint, if both have one."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """√(Σ g²) over all gradients, a scalar; not finite if a gradient is not."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # Of gradients in pieces it is a sum that the processes have yet to add up.
    return summed(torch.nn.utils.get_total_norm(gradients))
