"""Structured RigL (Lasby et al., arXiv:2305.02299): a constant fan-in, and neurons that may go."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from rarefy import masks
from rarefy.algorithms.option_checks import check_fraction
from rarefy.algorithms.options import Fraction, Sparsity
from rarefy.algorithms.view import WeightView, also_by_parts
from rarefy.errors import ConfigError
from rarefy.methods.rigl import RigL
from rarefy.ties import TieOrder


class SRigL(RigL):
    """Drops the smallest weights of a layer, and lets every neuron grow back to the same number of inputs.

    Drop the smallest |w| of the layer, K = drop_fraction · active of them; each neuron grows where |dense gradient| is
    largest, until it has k inputs. Neurons with fewer than `min_salient`·k salient connections (those that stay, and
    the K inactive ones of largest gradient) are ablated for good, and the others share their connections.

    Args:
        sparsity: fraction of inactive connections, a number in [0, 1) or a schedule.
        min_salient: the paper's γ_sal, in [0, 1]; 0 ablates no neuron, the paper suggests 0.3.
        **options: the options of `DropAndGrow`; as `pattern`, `fan_in` alone.

    Raises:
        ConfigError: another pattern, or a `min_salient` out of range.

    Example:
        >>> import torch
        >>> SRigL(0.7).apply(layer := torch.nn.Linear(10, 4))
        >>> layer.weight_mask.sum(1).tolist()
        [3, 3, 3, 3]
    """

    name: ClassVar[str] = "srigl"

    def __init__(self, sparsity: Sparsity, *, min_salient: Fraction = 0.0, **options: Any) -> None:
        pattern = options.setdefault("pattern", "fan_in")
        if pattern != "fan_in":
            raise ConfigError("pattern", pattern, "fan_in for srigl", "pattern: fan_in")
        if options.get("keep_rows"):
            raise ConfigError("keep_rows", "true", "false for srigl: outputs have a fan-in, or are ablated")
        super().__init__(sparsity, **options)
        self.min_salient = check_fraction(min_salient, "min_salient")

    @also_by_parts
    def update_mask(self, view: WeightView) -> Tensor:
        """Drops in the layer, ablates, grows in each neuron."""
        if bool(view.mask.all()):
            return self.keep_top(view.weight.abs(), view.sparsity)
        size = view.weight.abs().flatten(1)
        grow = self.grow_score(view.weight, view.gradient).flatten(1)
        mask = view.mask.flatten(1)
        order = TieOrder.of(self.generator)
        dropped = round(self.current(self.drop_fraction) * int(mask.count_nonzero()))
        kept = masks.drop_lowest(mask, size, dropped, order)
        salient = kept | (masks.grow_highest(mask, grow, dropped, order.other()) & ~mask)
        fan_in = masks.kept_count(mask.shape[1], view.sparsity)
        alive = self.alive(mask, salient, fan_in)
        # What neurons had that went is shared among the others.
        inputs = min(mask.shape[1], fan_in * len(mask) // int(alive.sum()))
        return (masks.drop_and_grow(kept, size, grow, inputs, 0.0, order) & alive[:, None]).view_as(view.mask)

    def alive(self, mask: Tensor, salient: Tensor, fan_in: int) -> Tensor:
        """Bool [neurons]: which have enough salient connections; one of them in any case."""
        counts = salient.sum(1)
        if not self.min_salient:
            # All of them, those without connections too, which grow back.
            return counts >= 0
        present = mask.any(1)
        alive = present & (counts >= max(self.min_salient * fan_in, 1))
        return (
            alive if bool(alive.any()) else masks.drop_lowest(present, counts.float(), int(present.sum()) - 1)
        )
