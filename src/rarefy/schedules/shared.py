"""What all schedules have in common: how pydantic checks them."""

from __future__ import annotations

from pydantic import ConfigDict

# A validator is built with the first schedule of a class; few runs use more than two of them.
CONFIG = ConfigDict(extra="forbid", defer_build=True)


def require_order(start: int, stop: int) -> None:
    """Refuses a stop that does not come after its start, for validators, which tell the path.

    Raises:
        ValueError: it does not.
    """
    if stop <= start:
        raise ValueError(f"a stop after start (start is {start}, stop is {stop})")
