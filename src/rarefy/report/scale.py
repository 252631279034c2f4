"""Round numbers for axes, and numbers as people read them."""

from __future__ import annotations

import math

_LETTERS = ("", "k", "M", "G", "T", "P")


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round numbers within [low, high], evenly spaced.

    Args:
        low: the lower end.
        high: above `low`.
        most: about how many, ≥ 2.

    Example:
        >>> ticks(0, 1, 5), ticks(130, 870, 5)
        ([0.0, 0.25, 0.5, 0.75, 1.0], [200.0, 400.0, 600.0, 800.0])
    """
    rough = (high - low) / max(most - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    width = next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= rough * 0.999)
    # An end that is a tick but for its rounding is one.
    first = math.ceil(low / width - 1e-12)
    last = math.floor(high / width + 1e-12)
    return [round(index * width, 12) for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high], thinned to at most about eight.

    Example:
        >>> log_ticks(0.5, 2000)
        [1.0, 10.0, 100.0, 1000.0]
    """
    first = math.ceil(math.log10(low) - 1e-9)
    last = math.floor(math.log10(high) + 1e-9)
    return [10.0**power for power in range(first, last + 1, max(1, (last - first) // 6))]


def readable(value: float, unit: str = "number") -> str:
    """A number in few characters.

    Args:
        value: any number.
        unit: `number` or `percent`, for a fraction.

    Example:
        >>> [readable(v) for v in (0, 0.000312, 2.34567, 1234, 1_250_000)]
        ['0', '0.000312', '2.346', '1,234', '1.25M']
        >>> readable(0.9125, "percent"), readable(1.0, "percent")
        ('91.25%', '100%')
    """
    if unit == "percent":
        return f"{value * 100:.2f}".rstrip("0").rstrip(".") + "%"
    size = abs(value)
    if size >= 100_000:
        return scaled(value)
    if size >= 1000 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}" if size >= 0.01 else f"{value:.3g}"


def scaled(value: float, unit: str = "") -> str:
    """A large number with a letter for its thousands.

    Example:
        >>> scaled(124_439_808), scaled(2.5e12, "FLOP"), scaled(999)
        ('124M', '2.5 TFLOP', '999')
    """
    power = min(len(_LETTERS) - 1, int(math.log10(abs(value)) // 3)) if abs(value) >= 1 else 0
    space = " " if unit else ""
    return f"{value / 1000**power:.3g}{space}{_LETTERS[power]}{unit}"
