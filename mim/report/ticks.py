"""Round numbers on the axes of charts, and short numbers for people."""

from __future__ import annotations

import math

STEPS = (1, 2, 2.5, 5, 10)  # between two ticks, times a power of ten


def linear(low: float, high: float, *, most: int = 5) -> list[float]:
    """At most `most` round numbers within [low, high], evenly apart."""
    span = high - low
    if span <= 0 or not math.isfinite(span):
        return [low]
    magnitude = 10.0 ** math.floor(math.log10(span / most))
    for step in (factor * magnitude * scale for scale in (1, 10) for factor in STEPS):
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
        if last - first < most:
            return [round(k * step, 12 - math.floor(math.log10(step))) for k in range(first, last + 1)]
    return [low]


def logarithmic(low: float, high: float, *, most: int = 5) -> list[float]:
    """At most `most` round numbers within [low, high], both positive: powers of ten, with 2 and 5 where few fit."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1, 2, 5), (1, 3), (1,)):
        ticks = [f * 10.0**k for k in range(first, last + 1) for f in factors]
        ticks = [t for t in ticks if low * (1 - 1e-9) <= t <= high * (1 + 1e-9)]
        if len(ticks) <= most:
            return ticks if len(ticks) > 1 else linear(low, high, most=most)
    every = math.ceil(len(ticks) / most)
    return ticks[::every]


def short(value: float) -> str:
    """A number in about four digits: 0.5257, 12.4, 1,250, 3.2e-05, 1.3 M."""
    if not math.isfinite(value):
        return "not finite" if math.isnan(value) else ("∞" if value > 0 else "−∞")
    size = abs(value)
    if size >= 1e12 or 0 < size < 1e-4:
        text = f"{value:.3g}"
    elif size >= 1e6:
        unit, name = (1e9, "G") if size >= 1e9 else (1e6, "M")
        text = f"{value / unit:.3g} {name}"
    elif size >= 1000 or (value == int(value) and size < 1000):
        text = f"{value:,.0f}"
    else:
        text = f"{value:.4g}"
    return text.replace("-", "−", 1) if text.startswith("-") else text
