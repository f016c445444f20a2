"""Curves from the lines of logs, the losses that need no learning, and skill = 1 - loss / baseline."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mim.report.runs import Run, number

COLUMNS = 400  # pixel columns that a chart can tell apart
COLOURS_PER_CHANNEL = 8  # of mpp's classes (mim/objectives/mpp.py)


@dataclass(frozen=True)
class Curve:
    """Values over steps, finite and in order of the steps."""

    name: str  # of what is shown: "training", "held out"; of a baseline, what it does
    run: int  # number of its run
    steps: np.ndarray  # (n,) float64
    values: np.ndarray  # (n,) float64
    baseline: bool = False
    num_logged: int = 0  # values before thinning
    not_finite: tuple[int, ...] = ()  # steps of values that are left out

    def __len__(self) -> int:
        return len(self.steps)


def of(run: int, name: str, points: Iterable[tuple[Any, Any]], *, baseline: bool = False) -> Curve:
    """A curve of (step, value); what is no number is left out, what is not finite is named."""
    found = [(float(step), value) for step, raw in points if (value := number(raw)) is not None]
    good = sorted((point for point in found if math.isfinite(point[1])), key=lambda point: point[0])
    bad = tuple(int(step) for step, value in found if not math.isfinite(value))
    steps, values = np.array(good, dtype=np.float64).reshape(-1, 2).T
    return Curve(name, run, steps, values, baseline, len(good), bad)


def logged(runs: list[Run], event: str, key: str, name: str, *, evaluation: str | None = None) -> list[Curve]:
    """A number of the lines of a kind, one curve per run that logs it."""
    curves = []
    for index, run in enumerate(runs):
        lines = [line for line in run.events(event) if key in line and evaluation in (None, line.get("eval"))]
        curve = of(index, name, ((line["step"], line[key]) for line in lines))
        if len(curve) or curve.not_finite:
            curves.append(curve)
    return curves


def thinned(curve: Curve, *, columns: int = COLUMNS) -> Curve:
    """The curve with the smallest and the largest value of each pixel column, and its first and last point."""
    if len(curve) <= 2 * columns:
        return curve
    span = curve.steps[-1] - curve.steps[0] or 1.0
    column = np.minimum((curve.steps - curve.steps[0]) / span * columns, columns - 1).astype(int)
    order = np.lexsort((curve.values, column))
    first = np.flatnonzero(np.r_[True, np.diff(column[order]) > 0])  # of each column that holds anything
    last = np.r_[first[1:] - 1, len(order) - 1]
    kept = np.unique(np.concatenate([order[first], order[last], [0, len(curve) - 1]]))
    return replace(curve, steps=curve.steps[kept], values=curve.values[kept])


def trivial_loss(run: Run) -> tuple[str, float] | None:
    """What an answer that learns nothing costs, where the recipe alone decides it: (what it answers, its loss).

    MAE divides targets by their patch's unbiased deviation, so that its mean costs (P - 1) / P of P pixel values
    (constant patches cost nothing); K equally likely classes cost log K.
    """
    objective, encoder = run.section("objective"), run.section("encoder")
    name = objective.get("name")
    classes = number(objective.get("num_codes"))
    if name == "mae" and objective.get("norm_pix_loss") is not False:
        side, channels = number(encoder.get("patch_size")), number(run.section("data").get("channels"))
        pixels = (channels or 3) * (side or 0) ** 2
        return "mean patch", (pixels - 1) / pixels if pixels > 1 else 1.0
    if name == "mpp":
        classes = COLOURS_PER_CHANNEL ** int(number(run.section("data").get("channels")) or 3)
    if name == "classify" and not objective.get("distill"):
        classes = number(objective.get("num_classes"))
    if name in ("beit", "beit2", "mpp", "classify") and classes and classes > 1:
        heads = 2 if name == "beit2" else 1  # its loss is the sum of two
        return "uniform guess", heads * math.log(classes)
    return None


def skill(loss: Curve, baseline: float, name: str) -> Curve:
    """1 - loss / baseline: 0 is no better than the baseline, 1 is perfect."""
    return replace(loss, name=name, values=1 - loss.values / baseline)


def constant(run: int, name: str, value: float, steps: np.ndarray) -> Curve:
    """A baseline that does not change, over the span of some steps."""
    ends = np.array([steps.min(), steps.max()]) if len(steps) else np.zeros(0)
    return Curve(name, run, ends, np.full(len(ends), value), baseline=True, num_logged=len(ends))
