"""What the attachment asks of the algorithm that it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar, Protocol

from rarefy.algorithms.attachment.trained_form import Form
from rarefy.algorithms.view import Needs, StepView
from rarefy.storage.growth import GrowthRequest


class Policy(Form, Protocol):
    """What an attachment asks of the algorithm that it serves."""

    needs: ClassVar[Needs]
    connection_state: ClassVar[Mapping[str, float]]
    compute: str
    awaiting: set[str]

    @property
    def autoupdate(self) -> bool:
        """Whether updates run by themselves."""
        ...

    @property
    def update_schedule(self) -> Callable[[int], bool]:
        """On which steps."""
        ...

    @property
    def observes(self) -> bool:
        """Whether `observe` wants to be called."""
        ...

    def update(self) -> None:
        """Called after an optimizer step that is an update step."""
        ...

    def observe(self, view: StepView) -> None:
        """Called before an optimizer step, for each weight that it changes."""
        ...

    def gradient_request(self) -> GrowthRequest | None:
        """Which part of the dense gradient the coming update can need; None for all of it."""
        ...
