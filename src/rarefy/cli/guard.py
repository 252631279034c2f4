"""Every fault of a command becomes one line and an exit code."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from rarefy.cli import messages
from rarefy.cli.overrides import Flags, apply_flags
from rarefy.distributed import lost_another, place
from rarefy.errors import ConfigError, RarefyError, join_path
from rarefy.run.schema import read_file
from rarefy.trainer.signals import Interrupted
from rarefy.yaml_files.yaml_lines import line_of

log = logging.getLogger("rarefy")

DONE = 0
FAILED = 1
BAD_INPUT = 2
# 128 and the number of SIGINT, as shells have it.
INTERRUPTED = 130


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
        # Before RarefyError, of which it is one: an end that was asked for is no error.
        except Interrupted as stop:
            messages.say(str(stop))
            return stop.exit_code
        except RarefyError as error:
            # A configuration is bad input whenever it is found out.
            is_failure = has_begun() and not isinstance(error, ConfigError)
            return _fail(str(error), FAILED if is_failure else BAD_INPUT)
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except Exception as error:
            log.debug("%s", traceback.format_exc())
            if lost_another(error):
                return _fail("another process has ended, and this one cannot go on without it", FAILED)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return _fail(f"unexpected {reason} (--logging DEBUG shows where)", FAILED)


@contextmanager
def located(file: Path, flags: Flags) -> Iterator[dict[str, Any]]:
    """A configuration with its flags; what is wrong with it inside is said with the file's line.

    A value that a flag gave has no line.

    Args:
        file: the YAML file.
        flags: what changes it.

    Yields:
        The changed file as plain data.

    Raises:
        ConfigError: as raised inside, with its place.
    """
    content = read_file(file)
    # Without a flag the file is what it says.
    changed = content if flags == Flags() else apply_flags(content, flags)
    try:
        yield changed
    except ConfigError as error:
        line = None
        if _reached(content, error) == _reached(changed, error):
            # Editors of Windows put a mark of the encoding in front.
            line = line_of(file.read_text(encoding="utf-8-sig"), error.path, error.key)
        raise (error if line is None else error.at(f"{file}, line {line}")) from error


def _reached(content: Any, error: ConfigError) -> list[Any]:
    """The value that an error is about, and how far its path leads to it."""
    values = []
    rest = join_path(error.path, error.key)
    while rest and isinstance(content, dict | list):
        keys = range(len(content)) if isinstance(content, list) else content
        names = {(f"[{key}]" if isinstance(content, list) else str(key)): key for key in keys}
        fitting = [name for name in names if rest == name or rest.startswith((f"{name}.", f"{name}["))]
        if not fitting:
            break
        # A key may have dots itself, and another be the beginning of it.
        name = max(fitting, key=len)
        content = content[names[name]]
        rest = rest[len(name) :].removeprefix(".")
        values.append(name)
    return [values, content if not rest else None]


def _fail(problem: str, code: int) -> int:
    # One line, however narrow the terminal; brackets and colons in paths are not rich's markup.
    rank, count = place()
    who = f" (process {rank} of {count})" if count > 1 else ""
    Console(stderr=True, soft_wrap=True, highlight=False, markup=False, emoji=False).print(
        f"Error{who}: {problem}"
    )
    return code
