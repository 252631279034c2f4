"""How weights are drawn: the `initializer` blocks of a model."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from rarefy.errors import ConfigError

Finite = Annotated[float, Field(allow_inf_nan=False, description="a number")]
Positive = Annotated[Finite, Field(gt=0, description="a number above 0")]


class InitializerConfig(BaseModel):
    """A normal distribution, cut off at `a` and `b` when it is `truncated_normal`.

    The bounds are by default two standard deviations from the mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, defer_build=True)

    name: Literal["truncated_normal", "normal"] = "truncated_normal"
    mean: Finite = 0.0
    std: Positive = 0.02
    a: Finite | None = None
    b: Finite | None = None

    @property
    def bounds(self) -> tuple[float, float]:
        """The smallest and the largest value that may be drawn."""
        low = self.mean - 2 * self.std if self.a is None else self.a
        return low, self.mean + 2 * self.std if self.b is None else self.b

    def fill_(self, weight: Tensor) -> None:
        """Draws every entry of `weight` in place, from torch's global generator."""
        if self.name == "normal":
            nn.init.normal_(weight, self.mean, self.std)
        else:
            nn.init.trunc_normal_(weight, self.mean, self.std, *self.bounds)

    def divided(self, by: float) -> InitializerConfig:
        """The same distribution with spread and given bounds divided, as depth and muP ask for; the mean stays.

        Example:
            >>> InitializerConfig(std=0.1, a=-0.2).divided(2.0)
            InitializerConfig(name='truncated_normal', mean=0.0, std=0.05, a=-0.1, b=None)
        """
        low = None if self.a is None else self.a / by
        high = None if self.b is None else self.b / by
        return self.model_copy(update={"std": self.std / by, "a": low, "b": high})

    def check(self, key: str) -> None:
        """Refuses bounds without anything between them.

        Raises:
            ConfigError: `a` is not below `b`.
        """
        low, high = self.bounds
        if self.name == "truncated_normal" and low >= high:
            raise ConfigError(key, f"the interval from {low} to {high}", "bounds a < b", "a: -0.04, b: 0.04")


Initializer = Annotated[
    InitializerConfig | None,
    Field(
        description="a normal distribution: name (truncated_normal or normal), mean, std > 0, a, b",
        examples=["{name: truncated_normal, std: 0.02}"],
    ),
]
