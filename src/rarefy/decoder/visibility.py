"""What each position may see, and how strongly distance counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rarefy.decoder.rotary import Rotation


@dataclass(frozen=True)
class SequenceContext:
    """What every layer is told about the positions of a sequence; made once a forward pass.

    Args:
        rotation: turns queries and keys; None without rotary positions.
        mask: of the layers that see everything before: a bool mask or a bias that is added to the scores; None
            where plain causal attention is meant.
        windowed_mask: the same for the layers with a sliding window.
    """

    rotation: Rotation | None = None
    mask: Tensor | None = None
    windowed_mask: Tensor | None = None


def visible(length: int, window: int | None, sinks: int, device: torch.device) -> Tensor:
    """Who sees whom [query, key]: what came before, itself, no farther back than the window, and the sink tokens.

    Example:
        >>> visible(4, 2, 1, torch.device("cpu")).int().tolist()
        [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 1, 1]]
    """
    positions = torch.arange(length, device=device)
    distance = positions.unsqueeze(1) - positions
    seen = distance >= 0
    if window is not None:
        seen &= (distance < window) | (positions < sinks)
    return seen


def mask_of(
    length: int, window: int | None, sinks: int, bias: Tensor | None, device: torch.device
) -> Tensor | None:
    """The mask of a layer; None where torch's causal attention does the same.

    Args:
        length: of the sequence.
        window: how many positions are seen, the own one included; None for all.
        sinks: how many of the first positions are always seen.
        bias: added to the scores [heads, query, key]; None for none.
        device: where to make it.
    """
    has_window = window is not None and window < length
    if bias is None:
        return visible(length, window, sinks, device) if has_window else None
    return bias.masked_fill(~visible(length, window, sinks, device), -torch.inf)
