"""Calls the callbacks that have something to do at an event."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rarefy.callbacks.events import Callback, Logger
from rarefy.errors import RarefyError
from rarefy.validation import shorten

# Read off the class, so that a new event is declared there and nowhere else.
EVENTS = tuple(name for name in vars(Callback) if name == "setup" or name.startswith("on_"))


class Dispatcher:
    """Knows which callbacks override which events, so that an event without listeners costs one look-up.

    Args:
        trainer: what every listener is shown.
        callbacks: called first, in order.
        loggers: called next, in order.

    Raises:
        RarefyError: something that is no callback or no logger.
    """

    def __init__(self, trainer: Any, callbacks: Sequence[Callback], loggers: Sequence[Logger]) -> None:
        _check(callbacks, Callback, "callbacks")
        _check(loggers, Logger, "loggers")
        self._trainer = trainer
        self._loggers = loggers
        self._listeners: dict[str, list[Callable[..., None]]] = {name: [] for name in EVENTS}
        for callback in (*callbacks, *loggers):
            for name in EVENTS:
                # On the classes, as each look at an object's method makes another bound one.
                if getattr(type(callback), name) is not getattr(Callback, name):
                    self._listeners[name].append(getattr(callback, name))

    def __call__(self, event: str, *arguments: Any) -> None:
        """Calls every callback that overrides `event`."""
        for listener in self._listeners[event]:
            listener(self._trainer, *arguments)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Gives metrics to every logger, in order."""
        for logger in self._loggers:
            logger.log(self._trainer, metrics, step)


def _check(given: Sequence[Any], kind: type[Callback], name: str) -> None:
    for one in given:
        if not isinstance(one, kind):
            form = f"objects of a subclass of {kind.__name__}"
            raise RarefyError(f"{name} has {shorten(one)}; give {form}, not the class itself")
