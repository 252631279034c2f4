"""What an algorithm passes on to its attachment."""

from __future__ import annotations

from torch import nn
from torch.optim import Optimizer

from rarefy.algorithms.attachment.attachment import Attachment
from rarefy.distributed import Traffic
from rarefy.storage.parameter import SparseParameter


class Attached:
    """The weights of an algorithm, and what trains them."""

    _attachment: Attachment

    @property
    def parameters(self) -> dict[str, SparseParameter]:
        """The sparse weights by name."""
        return self._attachment.parameters

    @property
    def optimizers(self) -> list[Optimizer]:
        """Those that are followed."""
        return self._attachment.optimizers

    @property
    def step(self) -> int:
        """How many optimizer steps the sparse weights have taken."""
        return self._attachment.step

    @step.setter
    def step(self, value: int) -> None:
        self._attachment.step = value

    @property
    def traffic(self) -> Traffic:
        """What this process gave into the averages of sparse gradients so far; set where somebody counts more."""
        return self._attachment.traffic

    @traffic.setter
    def traffic(self, traffic: Traffic) -> None:
        self._attachment.traffic = traffic

    def models(self) -> list[nn.Module]:
        """The models that still live; weights of layers that are no longer in them are forgotten."""
        return self._attachment.models()

    def track(self, copy: nn.Module) -> None:
        """Lets a copy of the model follow its topology; see `Sparsifier.track`."""
        self._attachment.track(copy)
