"""Axes: where ticks are, how many readings are drawn, which range is shown."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nvae.report.record import Point


@dataclass(frozen=True)
class Bucket:
    """Neighbouring readings drawn as one.

    Attributes:
        step: their mean step.
        mean: of the values.
        low: smallest.
        high: largest.
    """

    step: float
    mean: float
    low: float
    high: float


def thin(points: Sequence[Point], most: int) -> list[Bucket]:
    """At most ``most`` buckets of as equal a number of readings as can be."""
    count = min(most, len(points))
    buckets = []
    for i in range(count):
        part = points[i * len(points) // count : (i + 1) * len(points) // count]
        values = [value for _, value in part]
        step = sum(step for step, _ in part) / len(part)
        buckets.append(Bucket(step, sum(values) / len(values), min(values), max(values)))
    return buckets


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers within [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    spacing = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
    first = math.ceil(low / spacing - 1e-9)
    last = math.floor(high / spacing + 1e-9)
    return [i * spacing for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten within [low, high]; 1, 2, 5 steps where that are fewer than two."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 2, 5)):
        found = [m * 10.0**e for e in exponents for m in steps if low <= m * 10.0**e <= high]
        if len(found) >= 2:
            return found[:: max(1, math.ceil(len(found) / 5))]
    return [low, high]


def shown_range(values: Sequence[float]) -> tuple[float, float]:
    """From smallest to largest, unless a few outliers would flatten everything else.

    The range is cut where the middle 96 percent take less than a third of it.
    """
    ordered = sorted(values)
    cut = len(ordered) // 50
    low, high = ordered[0], ordered[-1]
    inner_low, inner_high = ordered[cut], ordered[-1 - cut]
    if inner_high > inner_low and high - low > 3 * (inner_high - inner_low):
        low, high = inner_low, inner_high
    margin = 0.04 * (high - low) or abs(high) * 0.1 or 1.0
    # nothing that cannot be negative gets an axis below zero
    return (low - margin if low < 0 or low > margin else 0.0), high + margin
