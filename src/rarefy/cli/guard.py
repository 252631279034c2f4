"""Every fault of a command becomes one line and an exit code."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable

from rich.console import Console

from rarefy.cli import messages
from rarefy.errors import ConfigError, RarefyError
from rarefy.trainer.signals import Interrupted

log = logging.getLogger("rarefy")

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def guarded(action: Callable[[], None], has_begun: Callable[[], bool] = lambda: False) -> int:
    """Does something; never raises.

    Args:
        action: what to do.
        has_begun: whether the work itself had begun, so that a failure is not one of the input.

    Returns:
        The exit code: 0 done, 2 bad configuration or input, 1 failure while running, 128 + the signal's
        number when interrupted.
    """
    with messages.shown_on_stderr():
        try:
            action()
            return DONE
        except Interrupted as stop:
            messages.say(str(stop))
            return stop.exit_code
        except RarefyError as error:
            is_failure = has_begun() and not isinstance(error, ConfigError)
            return _fail(str(error), FAILED if is_failure else BAD_INPUT)
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except Exception as error:
            log.debug("%s", traceback.format_exc())
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return _fail(f"unexpected {reason} (--logging DEBUG shows where)", FAILED)


def _fail(problem: str, code: int) -> int:
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        f"Error: {problem}"
    )
    return code
