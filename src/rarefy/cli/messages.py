"""What the command line says beside its tables: log messages and warnings, one plain line each."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from rarefy.distributed import is_first
from rarefy.trainer.plan import VERBOSE
from rarefy.trainer.session_builder import set_log_level

_LOGGER = logging.getLogger("rarefy")


class _Lines(logging.Formatter):
    """The message alone; from warnings upwards with the level in front."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        return text if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: {text}"


@contextmanager
def shown_on_stderr() -> Iterator[None]:
    """Shows the messages of rarefy and Python's warnings on standard error, each once.

    Of several processes only the first shows messages below warnings.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    handler.addFilter(lambda record: record.levelno >= logging.WARNING or is_first())
    logging.addLevelName(VERBOSE, "VERBOSE")
    level = _LOGGER.level
    _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    seen: set[str] = set()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            # These are for the authors of libraries; what a file should change is a FutureWarning.
            warnings.simplefilter("ignore", DeprecationWarning)
            # `catch_warnings` puts the old one back.
            warnings.showwarning = lambda message, *_, **__: _warn_once(str(message), seen)
            yield
    finally:
        _LOGGER.removeHandler(handler)
        _LOGGER.setLevel(level)


def _warn_once(text: str, seen: set[str]) -> None:
    if text not in seen:
        seen.add(text)
        _LOGGER.warning("%s", text)


def set_level(name: str | None) -> None:
    """Shows messages from level `name` on; None is INFO."""
    set_log_level(name or "INFO")


def say(text: str) -> None:
    """An ordinary message."""
    _LOGGER.info(text)
