"""Which parts of a given checkpoint a run begins with."""

from __future__ import annotations

from rarefy.callbacks.events import Callback
from rarefy.errors import ConfigError
from rarefy.validation import shorten


class LoadCheckpointStates(Callback):
    """Takes only a part of the checkpoint that a run is started from, as `--load_checkpoint_states` does.

    A run that goes on from its own newest checkpoint takes everything.

    Args:
        load_checkpoint_states: `all`, `model`, or `model,optimizer`, which keeps the optimizer's state as well.

    Raises:
        ConfigError: anything else.

    Example:
        >>> LoadCheckpointStates("model").states
        'model'
    """

    def __init__(self, load_checkpoint_states: str | list[str] = "all") -> None:
        given = load_checkpoint_states
        names = given.split(",") if isinstance(given, str) else given
        if names not in (["all"], ["model"], ["model", "optimizer"]):
            allowed = (
                "all, model (weights and masks) or model,optimizer (the rest of a checkpoint goes together)"
            )
            raise ConfigError("load_checkpoint_states", shorten(given), allowed)
        self.states = ",".join(names)
