"""One optimizer step: every micro-batch forward and backward, then unscale → clip → step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rarefy.distributed import mean_over_ranks
from rarefy.models.call import loss_of, to_device
from rarefy.storage.optimizer_traits import trained_parameters
from rarefy.trainer.micro_batches import Part, parts_of_step
from rarefy.trainer.precision import gradient_norm
from rarefy.trainer.session import Session
from rarefy.trainer.skipped_steps import first_not_finite


@dataclass(frozen=True)
class StepOutcome:
    """What one optimizer step did.

    Args:
        loss: mean over the micro-batches.
        grad_norm: norm over all parameters, before clipping.
        lr: the learning rate of the first parameter group in this step; None where the optimizer works it out.
        culprit: why the step was skipped; None when it was taken.
    """

    loss: float
    grad_norm: float
    lr: float | None
    culprit: str | None = None


def take_step(session: Session, batches: list[Any]) -> StepOutcome:
    """Trains on the micro-batches of one optimizer step.

    A step whose loss or gradients are not finite is skipped: weights, optimizer, sparsity and schedulers
    stay as they are.

    Args:
        session: whose model learns.
        batches: the micro-batches, at least one, checked by the model.
    """
    optimizer = session.needed_optimizer
    precision = session.precision
    parts = parts_of_step(session, batches)
    micro_batches = sum(map(len, parts))
    losses: list[Tensor] = []
    index = 0
    for several in parts:
        for part in several:
            losses.append(_learn(session, part, index, micro_batches, len(batches)))
            index += 1
    precision.unscale(optimizer)
    # Callbacks see unscaled gradients, and what they do to them counts in the norm.
    session.emit("on_before_optimizer_step")
    norm = gradient_norm(trained_parameters(optimizer))
    # Parts of a batch add up to its loss, and the batches of a step are averaged; so are all processes, so that each of
    # them takes the step or skips it.
    loss = mean_over_ranks(torch.stack(losses).float().sum() / len(batches)).item()
    outcome = _outcome(session, loss, norm)
    if outcome.culprit is None:
        precision.clip(optimizer, norm)
        precision.step(optimizer)
    else:
        precision.skip()
    session.emit("on_after_optimizer_step")
    # After the event, whose callbacks may look at the gradients.
    optimizer.zero_grad(set_to_none=True)
    if outcome.culprit is None:
        for scheduler in session.schedulers:
            scheduler.step()
    return outcome


def _learn(session: Session, part: Part, index: int, count: int, batches: int) -> Tensor:
    """Adds the gradients of one of `count` micro-batches, of one of `batches` batches; returns its loss."""
    batch = to_device(part.batch, session.device)
    session.emit("on_train_batch_start", batch, index)
    session.emit("on_before_forward", batch)
    # Gradients of processes are averaged once a step, after the last micro-batch.
    with session.parallel.accumulating(session.forward.model, is_last=index == count - 1):
        with session.precision.autocast():
            outputs = session.forward(batch)
        session.emit("on_after_forward", outputs, batch)
        loss = loss_of(outputs)
        loss = loss if part.weight == 1 else loss * part.weight
        session.precision.backward(loss if batches == 1 else loss / batches)
    session.emit("on_after_backward")
    return loss.detach()


def _outcome(session: Session, loss: float, norm: Tensor) -> StepOutcome:
    grad_norm = norm.item()
    rate = session.needed_optimizer.param_groups[0].get("lr")
    lr = None if rate is None else float(rate)
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return StepOutcome(loss, grad_norm, lr)
    # Looked for only now: on every step it would cost as much as the norm.
    gradients = ((name, parameter.grad) for name, parameter in session.model.named_parameters())
    return StepOutcome(loss, grad_norm, lr, first_not_finite(gradients, loss))
