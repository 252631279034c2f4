"""What a run would do, worked out with one batch and one step that leave no trace."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from rarefy import filters
from rarefy.algorithms.base import SparsityAlgorithm
from rarefy.callbacks.flops import watched
from rarefy.distributions import share_out
from rarefy.models.call import loss_of, to_device
from rarefy.patterns import Pattern
from rarefy.run.builder import Builder, check_tokens
from rarefy.run.large_model import LargeModel, flops_of, shared_out, too_large
from rarefy.schedules import update_steps
from rarefy.storage.parameter import SparseParameter
from rarefy.storage.training_cost import memory_of
from rarefy.trainer.micro_batches import choose_size, parts_of
from rarefy.trainer.trainer import Trainer

# It takes a step: weights, gradients, and masks with what finding the first ones works in.
_COPIES_IN_A_PREVIEW = 3


@dataclass(frozen=True)
class Stage:
    """A parameter at one moment of the run.

    Args:
        step: the optimizer step.
        target: sparsity that its schedule asks for then; 0 before the first mask.
        kept: active connections, exact.
    """

    step: int
    target: float
    kept: int


@dataclass(frozen=True)
class ParameterPlan:
    """One parameter of the model.

    Args:
        name: as in `model.named_parameters()`.
        shape: of the weight.
        reason: the glob that matched, or why the parameter stays dense.
        algorithm: name of its algorithm; empty when dense.
        stages: at the start, after the first update and after the last one; empty when dense.
        structure: balance or pattern of its masks; empty when free.
        storage: how it is stored.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    algorithm: str = ""
    stages: tuple[Stage, ...] = ()
    structure: str = ""
    storage: str = "dense"

    @property
    def size(self) -> int:
        """Number of weight positions."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class UpdatePlan:
    """The update steps of one algorithm within the run; `first` and `last` are None without one."""

    algorithm: str
    first: int | None
    last: int | None
    count: int


@dataclass(frozen=True)
class CostPlan:
    """Cost of one optimizer step.

    Args:
        dense_flops: floating-point operations of forward and backward, every weight dense.
        sparse_flops: the same without the operations on inactive connections, at the last target.
        dense_bytes: weights, gradients and optimizer state, every weight dense.
        stored_bytes: the same as the run stores them, with masks.
    """

    dense_flops: int
    sparse_flops: int
    dense_bytes: int
    stored_bytes: int


@dataclass(frozen=True)
class RunPreview:
    """The plan of a run; see `preview`."""

    parameters: tuple[ParameterPlan, ...]
    updates: tuple[UpdatePlan, ...]
    cost: CostPlan
    loss: float | None
    total_steps: int
    # Why no step was taken; empty where one was.
    problem: str = ""


def preview(builder: Builder) -> RunPreview:
    """Builds everything, takes one step on one batch, and reads one batch of every validation.

    Nothing is written, no checkpoint is read, and the trainer is thrown away.

    Args:
        builder: of a configuration with a `fit` block.

    Returns:
        What the run would do.

    Raises:
        ConfigError: anything in the file that is not allowed.
        RarefyError: a batch that the model refuses.
    """
    config = builder.config
    builder.check()
    data = builder.train_data
    total = builder.total_steps
    large = too_large(builder, copies=_COPIES_IN_A_PREVIEW)
    if large is not None:
        return _preview_of_large(builder, large, total)
    trainer = builder.trainer(quiet=True)
    algorithms = trainer.sparsity.algorithms if trainer.sparsity is not None else []
    check_tokens(trainer.model, data, f"{config.path}.fit.train_dataloader")
    # Before the costs: the optimizer's state, which counts in them, is made by its first step.
    loss, flops, by_weight = one_step(trainer, next(iter(data)))
    for validation in builder.fit_validations:
        check_tokens(trainer.model, validation, f"{config.path}.fit.val_dataloader")
        try_batch(trainer, next(iter(validation)))
    parameters = tuple(plan_parameters(trainer.model, algorithms, total))
    cost = CostPlan(flops, flops - _of_inactive(by_weight, parameters), *_memory(trainer))
    return RunPreview(parameters, tuple(plan_updates(algorithms, total)), cost, loss, total)


def _preview_of_large(builder: Builder, large: LargeModel, total: int) -> RunPreview:
    """The plan of a run whose model does not fit: no weights, no step, no loss."""
    algorithms = builder.sparsity.algorithms if builder.sparsity is not None else []
    by_weight, flops = flops_of(large.model, next(iter(builder.train_data)))
    shared = list(shared_out(large.model, algorithms))
    sparse: dict[str, ParameterPlan] = {}
    for algorithm, chosen in shared:
        shapes = {name: candidate.shape for name, (candidate, _) in chosen.items()}
        stages = _stages_of(
            algorithm, shapes, {name: pattern for name, (_, pattern) in chosen.items()}, total
        )
        for name, (candidate, _) in chosen.items():
            reason = filters.decide(candidate, algorithm.globs).reason
            kind = algorithm.label
            structure = str(algorithm.pattern)
            sparse[name] = ParameterPlan(
                name, tuple(shapes[name]), reason, kind, stages[name], structure, "planned"
            )
    parameters = tuple(
        sparse.get(one.name, ParameterPlan(one.name, tuple(one.shape), _why_dense(one, algorithms)))
        for one in filters.candidates(large.model)
    )
    # Weights, gradients and two numbers of state, as of Adam; a mask takes a byte a position.
    masks = sum(one.size for one in sparse.values())
    memory = 4 * large.weight_bytes
    cost = CostPlan(flops, flops - _of_inactive(by_weight, parameters), memory, memory + masks)
    updates = tuple(plan_updates(algorithms, total))
    return RunPreview(
        parameters, updates, cost, None, total, f"{large}; planned without weights, no step was taken"
    )


def plan_parameters(
    model: nn.Module, algorithms: list[SparsityAlgorithm], total_steps: int
) -> Iterator[ParameterPlan]:
    """Every parameter of a model that its sparsity was applied to.

    Args:
        model: the model.
        algorithms: its algorithms; empty for a dense run.
        total_steps: optimizer steps of the run.

    Returns:
        Plans in the model's order, tied parameters once.
    """
    owners = {name: algorithm for algorithm in algorithms for name in algorithm.parameters}
    stages = {
        name: plan for algorithm in algorithms for name, plan in _stages(algorithm, total_steps).items()
    }
    for candidate in filters.candidates(model):
        shape = tuple(candidate.shape)
        owner = owners.get(candidate.name)
        if owner is None:
            yield ParameterPlan(candidate.name, shape, _why_dense(candidate, algorithms))
        else:
            structure = str(owner.pattern)
            storage = owner.parameters[candidate.name].storage.form
            reason = filters.decide(candidate, owner.globs).reason
            kind = owner.label
            yield ParameterPlan(
                candidate.name, shape, reason, kind, stages[candidate.name], structure, storage
            )


def _why_dense(candidate: filters.Candidate, algorithms: list[SparsityAlgorithm]) -> str:
    return filters.why_left(candidate, (algorithm.globs for algorithm in algorithms)) or "the run is dense"


def _stages(algorithm: SparsityAlgorithm, total_steps: int) -> dict[str, tuple[Stage, ...]]:
    """Start, first update and last update of every parameter of an algorithm."""
    shapes = {name: parameter.shape for name, parameter in algorithm.parameters.items()}
    patterns = {name: parameter.pattern for name, parameter in algorithm.parameters.items()}
    return _stages_of(algorithm, shapes, patterns, total_steps)


def _stages_of(
    algorithm: SparsityAlgorithm,
    shapes: Mapping[str, torch.Size],
    patterns: Mapping[str, Pattern],
    total_steps: int,
) -> dict[str, tuple[Stage, ...]]:
    steps = list(update_steps(algorithm.update_schedule, 0, total_steps))
    starts_dense = steps[:1] != [0]
    # The number of the update as well: a cycling schedule goes by it.
    moments = [(0, 0), *((step, index) for index, step in enumerate(steps) if step > 0)]
    chosen = [moments[0], moments[min(1, len(moments) - 1)], moments[-1]]
    targets = [
        0.0 if starts_dense and step == 0 else algorithm.target_at(step, index) for step, index in chosen
    ]
    shares = [share_out(algorithm.distribution, target, shapes) for target in targets]
    return {
        name: tuple(
            Stage(step, share[name], patterns[name].kept(shape, share[name]))
            for (step, _), share in zip(chosen, shares, strict=True)
        )
        for name, shape in shapes.items()
    }


def plan_updates(algorithms: list[SparsityAlgorithm], total_steps: int) -> Iterator[UpdatePlan]:
    """The update steps of every algorithm, from step 1 to `total_steps`."""
    for algorithm in algorithms:
        # Step 0 gives the first masks, which is no update.
        steps = list(update_steps(algorithm.update_schedule, 1, total_steps)) if algorithm.dynamic else []
        first, last = (steps[0], steps[-1]) if steps else (None, None)
        yield UpdatePlan(algorithm.label, first, last, len(steps))


def one_step(trainer: Trainer, batch: Any) -> tuple[float, int, dict[str, int]]:
    """Takes one step on one batch; the model's weights change.

    Args:
        trainer: with an optimizer.
        batch: as its data gives it.

    Returns:
        The loss, the floating-point operations of forward and backward, those of compact storage as if it was dense,
        and those with each weight by its name.

    Raises:
        RarefyError: the model refuses the batch or returns no loss.
    """
    trainer.session.forward.check(batch)
    choose_size(trainer.session, batch)
    trainer.model.train()
    total = 0.0
    by_weight: Counter[str] = Counter()
    with FlopCounterMode(display=False, custom_mapping=_AS_DENSE) as counter:
        for part in parts_of(trainer.session, batch):
            part = to_device(part, trainer.device)
            with trainer.precision.autocast(), watched(trainer.model, part) as flops:
                loss = loss_of(trainer.session.forward(part))
            by_weight.update(flops.in_training)
            loss.backward()
            total += float(loss.detach())
    # Without a scaler: what is wanted is the state that the step makes, to be measured.
    trainer.trained_by.step()
    return total, counter.get_total_flops(), by_weight


@torch.no_grad()
def try_batch(trainer: Trainer, batch: Any) -> None:
    """Shows the model one validation batch.

    Raises:
        RarefyError: the model refuses the batch or returns no loss.
    """
    trainer.session.forward.check(batch)
    trainer.model.eval()
    part = next(iter(parts_of(trainer.session, batch)))
    with trainer.precision.autocast():
        loss_of(trainer.session.forward(to_device(part, trainer.device)))


def _of_inactive(by_weight: Mapping[str, int], parameters: tuple[ParameterPlan, ...]) -> int:
    """The operations on connections that are inactive at the end."""
    planned = ((one, one.stages[-1].kept) for one in parameters if one.stages)
    return round(sum(by_weight.get(one.name, 0) * (1 - kept / max(one.size, 1)) for one, kept in planned))


def _forward_as_dense(x: tuple[int, ...], *rest: Any, **__: Any) -> int:
    rows, columns, *_ = rest[-1]
    return 2 * rows * columns * math.prod(x[:-1])


def _backward_as_dense(grad: tuple[int, ...], *rest: Any, **__: Any) -> int:
    (rows, columns, *_), needs = rest[-2:]
    return sum(needs[:2]) * 2 * rows * columns * math.prod(grad[:-1])


def _whole_forward_as_dense(x: tuple[int, ...], weight: tuple[int, ...], *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight) * math.prod(x[:-1])


def _whole_backward_as_dense(
    grad: tuple[int, ...],
    x: tuple[int, ...],
    weight: tuple[int, ...],
    is_transposed: bool,
    needs: Any,
    **_: Any,
) -> int:
    return sum(needs[:2]) * 2 * math.prod(weight) * math.prod(grad[:-1])


_AS_DENSE = {
    torch.ops.rarefy.linear: _whole_forward_as_dense,
    torch.ops.rarefy.linear_backward: _whole_backward_as_dense,
    torch.ops.rarefy.sparse_linear: _forward_as_dense,
    torch.ops.rarefy.sparse_linear_backward: _backward_as_dense,
}


def _sparse_parameters(trainer: Trainer) -> dict[str, SparseParameter]:
    algorithms = trainer.sparsity.algorithms if trainer.sparsity is not None else []
    return {name: one for algorithm in algorithms for name, one in algorithm.parameters.items()}


def _memory(trainer: Trainer) -> tuple[int, int]:
    """Bytes of weights, gradients and optimizer state: if all were dense, and as they are, with masks and indices."""
    total = memory_of(trainer.model, [trainer.trained_by], _sparse_parameters(trainer).values()).total
    return total.dense, total.sparse
