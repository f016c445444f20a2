"""Slopes of noisy curves, with the uncertainty that an advice needs.

Slopes are medians over all pairs of points (Theil 1950; Sen 1968, "Estimates of the Regression Coefficient Based on
Kendall's Tau"), which a quarter of outliers cannot turn. Their standard errors are those of least squares with a spread
taken from the median absolute deviation, widened where neighbouring residuals are alike, for then there are fewer
independent points than there seem to be.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NORMAL = 1.4826  # standard deviations of a normal per median absolute deviation
EFFICIENCY = 0.91  # of the median slope where residuals are normal, by variance
MOST_POINTS = 80  # of a fit: it looks at all pairs; longer curves are averaged in groups first
MOST_ALIKE = 0.9  # correlation of neighbouring residuals beyond which nothing more is taken off


@dataclass(frozen=True)
class Trend:
    """A straight line through a curve."""

    slope: float  # per unit of x
    error: float  # standard error of the slope
    span: float  # of x
    noise: float  # standard deviation of a point around the line

    @property
    def change(self) -> float:
        """What the line gains from its first x to its last."""
        return self.slope * self.span

    @property
    def change_error(self) -> float:
        return self.error * self.span

    def rises(self, deviations: float = 3.0) -> bool:
        """Whether the slope is above 0 by so many standard errors."""
        return self.slope > deviations * self.error

    def falls(self, deviations: float = 3.0) -> bool:
        """Whether the slope is below 0 by so many standard errors."""
        return self.slope < -deviations * self.error


def trend(x: Sequence[float], y: Sequence[float]) -> Trend:
    """The line through at least 4 points, x ascending; of no noise at all the error is 0."""
    if len(x) < 4:
        raise ValueError(f"{len(x)} points have no trend; give at least 4")
    xs, ys = thinned(np.asarray(x, dtype=float)), thinned(np.asarray(y, dtype=float))
    first, second = np.triu_indices(len(xs), 1)
    slope = float(np.median((ys[second] - ys[first]) / (xs[second] - xs[first])))
    residuals = ys - slope * xs
    residuals = residuals - np.median(residuals)
    spread = NORMAL * float(np.median(np.abs(residuals)))
    noise = spread * math.sqrt(len(xs) / (len(xs) - 2))
    alike = min(max(_alike(residuals), 0.0), MOST_ALIKE)
    about = float(np.square(xs - xs.mean()).sum())
    error = noise / math.sqrt(EFFICIENCY * about) * math.sqrt((1 + alike) / (1 - alike))
    return Trend(slope, error, float(xs[-1] - xs[0]), noise)


def thinned(values: np.ndarray) -> np.ndarray:
    """Means of equal groups of neighbours (the last may be smaller), at most `MOST_POINTS` of them."""
    size = -(-len(values) // MOST_POINTS)
    if size == 1:
        return values
    return np.array([values[start : start + size].mean() for start in range(0, len(values), size)])


def _alike(residuals: np.ndarray) -> float:
    """Correlation of neighbouring residuals, from -1 to 1."""
    total = float(np.square(residuals).sum())
    return float((residuals[1:] * residuals[:-1]).sum()) / total if total > 0 else 0.0
