"""Rotary positions: pairs of a head's entries turn by an angle that grows with the position."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from rarefy.decoder.decoder_config import GPTConfig, RotaryPairs
from rarefy.errors import ConfigError

Rotation = tuple[Tensor, Tensor]
_SCALING_KEYS: Mapping[str, frozenset[str]] = MappingProxyType(
    {
        "linear": frozenset(),
        "llama3": frozenset({"low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
        "yarn": frozenset(
            {
                "original_max_position_embeddings",
                "extrapolation_factor",
                "beta_fast",
                "beta_slow",
                "mscale_a",
                "mscale_b",
                "truncate",
            }
        ),
        "longrope": frozenset(
            {
                "original_max_position_embeddings",
                "short_factor",
                "long_factor",
                "short_mscale",
                "long_mscale",
                "attention_factor",
            }
        ),
    }
)


class Rotary:
    """The angles of every position, and how queries and keys turn by them.

    Pair i of a head turns by position · θ^(−2i/d), for the first d = `rotary_dim` entries. Its entries are 2i and
    2i + 1, or i and i + d/2 where `rotary_pairs` says halves.

    Args:
        config: of a model with rotary positions.

    Raises:
        ConfigError: `pos_scaling_extra_args` lacks a key of its type, or has one of another.

    Reference:
        Su et al., arXiv 2104.09864; linear: Chen et al., arXiv 2306.15595; YaRN: Peng et al., arXiv 2309.00071;
        LongRoPE: Ding et al., arXiv 2402.13753; llama3: Dubey et al., arXiv 2407.21783.
    """

    def __init__(self, config: GPTConfig) -> None:
        # These few numbers are read here, so they are real even where the model itself is only planned.
        pairs = torch.arange(0, config.rotary_size, 2, dtype=torch.float64, device="cpu")
        # In float64: what a frequency is off by grows with the position.
        frequencies = config.rope_theta ** (-pairs / config.rotary_size)
        given = dict(config.pos_scaling_extra_args or {})
        _check_keys(config.scaling_type, given)
        scaled, self.magnitude = _SCALINGS[config.scaling_type](frequencies, config, given)
        # Plain numbers: a buffer would lose digits when the model becomes bfloat16.
        self.frequencies: tuple[float, ...] = tuple(scaled.tolist())

    def rotation(self, length: int, device: torch.device) -> Rotation:
        """Cosines and sines [length, rotary_dim / 2] of the first positions, in float32."""
        positions = torch.arange(length, dtype=torch.float32, device=device)
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=device)
        angles = positions.unsqueeze(1) * frequencies
        return angles.cos() * self.magnitude, angles.sin() * self.magnitude


def rotate(heads: Tensor, rotation: Rotation, pairs: RotaryPairs = "adjacent") -> Tensor:
    """Queries or keys [batch, heads, sequence, head size], turned.

    Args:
        heads: the queries or keys.
        rotation: cosines and sines, one a pair.
        pairs: which entries turn together.

    Example:
        >>> quarter = torch.tensor([[0.0]]), torch.tensor([[1.0]])
        >>> rotate(torch.tensor([1.0, 0.0, 5.0]).reshape(1, 1, 1, 3), quarter).flatten().tolist()
        [0.0, 1.0, 5.0]
    """
    cosines, sines = (part.to(heads.dtype) for part in rotation)
    size = 2 * cosines.shape[-1]
    if pairs == "halves":
        first, second = heads[..., :size].chunk(2, dim=-1)
    else:
        first = heads[..., 0:size:2]
        second = heads[..., 1:size:2]
    both = (first * cosines - second * sines, second * cosines + first * sines)
    turned = torch.cat(both, dim=-1) if pairs == "halves" else torch.stack(both, dim=-1).flatten(-2)
    return turned if size == heads.shape[-1] else torch.cat((turned, heads[..., size:]), dim=-1)


def _check_keys(kind: str, given: Mapping[str, Any]) -> None:
    unknown = [key for key in given if key not in _SCALING_KEYS[kind]]
    if unknown:
        allowed = f"for pos_scaling_type: {kind} {', '.join(sorted(_SCALING_KEYS[kind])) or 'none'}"
        raise ConfigError("pos_scaling_extra_args", f"{', '.join(unknown)}", allowed)
    needs_length = kind in ("yarn", "longrope")
    if needs_length and "original_max_position_embeddings" not in given:
        allowed = f"it for pos_scaling_type: {kind}"
        example = "{original_max_position_embeddings: 8192}"
        raise ConfigError("pos_scaling_extra_args", "no original_max_position_embeddings", allowed, example)


Scaled = tuple[Tensor, float]


def _linear(frequencies: Tensor, config: GPTConfig, given: Mapping[str, Any]) -> Scaled:
    return frequencies / config.pos_scaling_factor, 1.0


def _llama3(frequencies: Tensor, config: GPTConfig, given: Mapping[str, Any]) -> Scaled:
    """Short waves stay, long ones stretch by the factor, those between go over smoothly."""
    length = given.get("original_max_position_embeddings", 8192)
    low = given.get("low_freq_factor", 1.0)
    high = given.get("high_freq_factor", 4.0)
    # How often each wave turns within the original length.
    turns = length * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / config.pos_scaling_factor), 1.0


def _yarn(frequencies: Tensor, config: GPTConfig, given: Mapping[str, Any]) -> Scaled:
    """As llama3, but the transition is linear in the number of the pair, and cosines and sines grow a little."""
    size = config.rotary_size
    length = given["original_max_position_embeddings"]

    def pair_with(turns: float) -> float:
        # The number of the pair whose wave turns so often within the original length.
        return size * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = pair_with(given.get("beta_fast", 32))
    high = pair_with(given.get("beta_slow", 1))
    if given.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, size - 1)
    number = torch.arange(len(frequencies), dtype=torch.float64, device="cpu")
    # Both ends may be the same pair.
    ramp = ((number - low) / max(high - low, 0.001)).clamp(0, 1)
    kept = (1 - ramp) * given.get("extrapolation_factor", 1.0)
    factor = config.pos_scaling_factor
    return frequencies * (kept + (1 - kept) / factor), yarn_magnitude(factor, given)


def yarn_magnitude(factor: float, given: Mapping[str, Any]) -> float:
    """What YaRN multiplies cosines and sines by: mscale_a · ln(factor) + mscale_b, and 1 where nothing is stretched.

    Args:
        factor: by which positions are stretched.
        given: options of the scaling.

    Example:
        >>> yarn_magnitude(1.0, {}), round(yarn_magnitude(4.0, {}), 4)
        (1.0, 1.1386)
    """
    return given.get("mscale_a", 0.1) * math.log(factor) + given.get("mscale_b", 1.0) if factor > 1 else 1.0


def _longrope(frequencies: Tensor, config: GPTConfig, given: Mapping[str, Any]) -> Scaled:
    """Every pair has a factor of its own, one list for the original length and one for longer models."""
    original = given["original_max_position_embeddings"]
    growth = config.max_position_embeddings / original
    name = "long" if growth > 1 else "short"
    factors = _factors(given, f"{name}_factor", len(frequencies))
    # √(1 + ln s / ln L), by the paper: s times as long as the original length L.
    default = math.sqrt(1 + math.log(growth) / math.log(original)) if growth > 1 else 1.0
    magnitude = given.get(f"{name}_mscale", given.get("attention_factor", default))
    return frequencies / torch.tensor(factors, dtype=torch.float64, device="cpu"), float(magnitude)


def _factors(given: Mapping[str, Any], key: str, count: int) -> Sequence[float]:
    factors = given.get(key)
    if not isinstance(factors, list) or len(factors) != count:
        raise ConfigError(f"pos_scaling_extra_args.{key}", factors, f"a list of {count} numbers")
    return factors


_SCALINGS: Mapping[str, Callable[[Tensor, GPTConfig, Mapping[str, Any]], Scaled]] = MappingProxyType(
    {"linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
)
