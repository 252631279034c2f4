"""Validation, which leaves no trace in training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from rarefy.checkpoint import rng
from rarefy.errors import RarefyError
from rarefy.models.call import loss_of, to_device
from rarefy.models.protocol import Metrics, ReportsMetrics
from rarefy.torch_private.ddp import end_workers
from rarefy.trainer.feed import Loader, open_loader
from rarefy.trainer.micro_batches import parts_of
from rarefy.trainer.session import Session
from rarefy.trainer.signals import signals_held_back

Validations = Loader | Sequence[Loader] | Mapping[str, Loader]


class MeanLoss:
    """`eval/loss`: the mean of the losses of all validation batches.

    Example:
        >>> metrics = MeanLoss()
        >>> metrics.update(torch.tensor(1.0), None); metrics.update(torch.tensor(2.0), None)
        >>> metrics.compute()
        {'eval/loss': 1.5}
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []

    def update(self, outputs: Any, batch: Any) -> None:
        """Adds one batch."""
        # Read at the end only: asking for a number makes a GPU finish what it is at.
        self._losses.append(loss_of(outputs).detach())

    def compute(self) -> dict[str, float]:
        """The mean over every batch so far."""
        # In double, since losses may be bfloat16 and batches many.
        return {"eval/loss": torch.stack(self._losses).double().mean().item()}


def open_validations(given: Validations | None) -> dict[str, Iterable[Any]]:
    """Validation data by name; the name is empty when there is only one.

    Args:
        given: one loader, a list of loaders (called 0, 1, …), or loaders by name. A list counts as a list
            of loaders when its elements are loaders or functions; otherwise it is a list of batches.

    Returns:
        The data, opened.

    Example:
        >>> open_validations([lambda: ["a"], lambda: ["b"]])
        {'0': ['a'], '1': ['b']}
    """
    if given is None:
        return {}
    if isinstance(given, Mapping):
        return {name: open_loader(loader) for name, loader in given.items()}
    if isinstance(given, list | tuple) and given and all(_is_loader(one) for one in given):
        names = [""] if len(given) == 1 else [str(index) for index in range(len(given))]
        return {name: open_loader(loader) for name, loader in zip(names, given, strict=True)}
    return {"": open_loader(given)}  # type: ignore[arg-type]


def _is_loader(element: Any) -> bool:
    """Whether an element of a list of validation data is a loader and not a batch."""
    if isinstance(element, Tensor | Mapping | list | tuple):
        return False
    return callable(element) or isinstance(element, Iterable)


def evaluate(
    session: Session, data: Iterable[Any], name: str = "", stop: Callable[[], bool] = lambda: False
) -> dict[str, float] | None:
    """The metrics of a model on validation data.

    Args:
        session: whose model is validated.
        data: batches; at most `loop.eval_steps` of them are read.
        name: of the data; metrics become `eval/<name>/…` when it is not empty.
        stop: asked before every batch whether to give up.

    Returns:
        Metrics by name; None when `stop` said so.

    Raises:
        RarefyError: the data has no batch.
    """
    model = session.model
    metrics = model.eval_metrics() if isinstance(model, ReportsMetrics) else MeanLoss()
    with untouched(model), torch.no_grad():
        session.emit("on_validate_start")
        # islice calls iter, and that starts the data workers.
        with signals_held_back():
            iterator = islice(data, session.loop.eval_steps)
        seen = _run(session, iterator, metrics, stop)
    if seen is None:
        return None
    if not seen:
        raise RarefyError("the validation data has no batch; an iterator gives its batches only once")
    prefix = f"eval/{name}/" if name else "eval/"
    results = {prefix + key.removeprefix("eval/"): value for key, value in metrics.compute().items()}
    session.log(results)
    session.emit("on_validate_end", results)
    return results


def evaluate_all(session: Session, validations: Mapping[str, Iterable[Any]]) -> dict[str, float]:
    """The metrics on several data by name, whose worker processes then end."""
    results: dict[str, float] = {}
    for name, data in validations.items():
        results |= evaluate(session, data, name) or {}
    close_validations(validations)
    return results


def close_validations(validations: Mapping[str, Iterable[Any]]) -> None:
    """Ends the worker processes that loaders keep from one validation to the next."""
    for data in validations.values():
        end_workers(data)


def _run(session: Session, iterator: Iterator[Any], metrics: Metrics, stop: Callable[[], bool]) -> int | None:
    seen = 0
    for batch in iterator:
        if stop():
            return None
        session.forward.check(batch)
        for part in parts_of(session, batch):
            _see(session, to_device(part, session.device), metrics)
        seen += 1
    return seen


def _see(session: Session, batch: Any, metrics: Metrics) -> None:
    session.emit("on_before_forward", batch)
    with session.precision.autocast():
        outputs = session.forward(batch)
    session.emit("on_after_forward", outputs, batch)
    metrics.update(outputs, batch)
    session.emit("on_validate_batch_end", outputs, batch)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module's mode and all random generators are as before."""
    # One by one: `train()` afterwards would also wake what somebody keeps in evaluation mode, such as frozen norms.
    modes = [(module, module.training) for module in model.modules()]
    states = rng.capture()
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        rng.restore(states)
