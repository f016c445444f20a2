"""Charts as inline SVG: what stands where.

The markup is in chart.svg.j2, hover values in page.js, colours in page.css.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mim.report import ticks
from mim.report.curves import Curve, thinned

WIDTH, HEIGHT = 440, 240  # of the view box; the page scales it
LEFT, TOP, BOTTOM = 52, 14, 32  # margins
LETTER = 7.4  # width of a letter, of the larger font that a phone gets
LONGEST_LABEL = 14  # letters
LABEL_HEIGHT = 15
RATIO_FOR_LOG = 20  # between the largest and the smallest value, from which a scale is logarithmic
FROM_ZERO = 0.2  # the axis begins at step 0 when that costs no more of it
MARKED = 24  # points up to which each one gets a dot
ROWS = 40  # of a table, per curve


@dataclass
class Chart:
    """Curves that share their axes."""

    title: str
    says: str  # what it shows, in a sentence
    curves: list[Curve]
    letters: Sequence[str] = ()  # of the runs, where there are several
    percent: bool = False  # values are shares
    may_be_log: bool = False
    with_zero: bool = False

    @property
    def drawn(self) -> Drawn:
        """Where everything stands."""
        return Drawn(self)

    def label(self, curve: Curve) -> str:
        """The name of a curve: of several runs the letter of its run goes first."""
        if not self.letters or curve.baseline:
            return curve.name
        letter = self.letters[curve.run]
        several = len({one.name for one in self.curves if not one.baseline}) > 1
        return f"{letter} {curve.name}" if several else letter

    def colour(self, curve: Curve) -> int:
        """The number of its colour in page.css, 0 for a baseline: of its run, or of its name where there is one run."""
        if self.letters and not curve.baseline:
            return 1 + curve.run % 6
        names = list(dict.fromkeys(one.name for one in self.curves if not one.baseline))
        return 0 if curve.baseline else 1 + names.index(curve.name) % 6

    def dash(self, curve: Curve) -> int:
        """The number of its dash pattern: curves that share a colour differ in it."""
        if curve.baseline:
            return 2
        names = list(dict.fromkeys(one.name for one in self.curves if not one.baseline))
        return (names.index(curve.name) if self.letters else 0) % 2 + (3 if curve.run >= 6 else 0)

    def value(self, value: float) -> str:
        """A value for people."""
        return f"{ticks.short(100 * value)} %" if self.percent else ticks.short(value)


@dataclass
class Line:
    """A drawn curve."""

    label: str  # in full
    shown: str  # what fits beside its end; nothing where it needs no name
    colour: int
    dash: int
    path: str  # of SVG
    dots: list[tuple[float, float]]
    label_y: float = 0.0


@dataclass
class Drawn:
    """A chart in the coordinates of its view box."""

    chart: Chart
    lines: list[Line] = field(init=False)

    def __post_init__(self) -> None:
        full = [curve for curve in self.chart.curves if len(curve)]
        self.thin = [thinned(curve) for curve in full]
        steps = np.concatenate([curve.steps for curve in full]) if full else np.zeros(1)
        values = np.concatenate([curve.values for curve in full]) if full else np.zeros(1)
        self.first, self.last = float(steps.min()), float(steps.max())
        if self.first == self.last:
            self.first, self.last = self.first - 1, self.last + 1
        if 0 < self.first < FROM_ZERO * self.last:
            self.first = 0.0
        self.log = self.chart.may_be_log and values.min() > 0 and values.max() >= RATIO_FOR_LOG * values.min()
        self.low, self.high = self._range(float(values.min()), float(values.max()))
        named = len(full) > 1 or bool(self.chart.letters)
        longest = max((len(self._short(self.chart.label(curve))) for curve in full), default=0) if named else 0
        self.right = WIDTH - (12 + LETTER * longest)
        self.lines = [self._line(curve, named) for curve in self.thin]
        _apart([line for line in self.lines if line.shown])

    def _range(self, low: float, high: float) -> tuple[float, float]:
        """The ends of the value axis."""
        if self.log:
            return low / (high / low) ** 0.05, high * (high / low) ** 0.05
        if self.chart.with_zero:
            low, high = min(low, 0.0), max(high, 0.0)
        around = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
        low_at_zero = self.chart.with_zero and low == 0.0
        return (low if low_at_zero else low - around), high + around

    def x(self, step: float) -> float:
        return LEFT + (step - self.first) / (self.last - self.first) * (self.right - LEFT)

    def y(self, value: float) -> float:
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        share = ((math.log(value) if self.log else value) - low) / (high - low)
        return HEIGHT - BOTTOM - share * (HEIGHT - BOTTOM - TOP)

    @property
    def step_ticks(self) -> list[tuple[float, str]]:
        """Places and names of the ticks of the step axis."""
        return [(self.x(step), ticks.short(step)) for step in ticks.linear(self.first, self.last, most=5)]

    @property
    def value_ticks(self) -> list[tuple[float, str]]:
        """Places and names of the ticks of the value axis."""
        make: Callable[..., list[float]] = ticks.logarithmic if self.log else ticks.linear
        values = make(self.low, self.high, most=5)
        names = [self.chart.value(value) for value in values]
        if len(set(names)) < len(names):  # four digits do not tell them apart
            names = [f"{100 * value:.7g} %" if self.chart.percent else f"{value:.7g}" for value in values]
        return [(self.y(value), name) for value, name in zip(values, names, strict=True)]

    @property
    def hover(self) -> dict[str, Any]:
        """What page.js needs to show values: the axes and the points that are drawn."""
        curves = [
            {
                "label": self.chart.label(curve),
                "colour": self.chart.colour(curve),
                "points": [[_rounded(s), _rounded(v)] for s, v in zip(curve.steps, curve.values, strict=True)],
            }
            for curve in self.thin
        ]
        axes = {"first": self.first, "last": self.last, "low": self.low, "high": self.high, "log": bool(self.log)}
        return {**axes, "right": self.right, "percent": self.chart.percent, "curves": curves}

    @property
    def notes(self) -> list[str]:
        """What the chart does not show: values between, and values that are not finite."""
        pairs = [
            (self.chart.label(c), c, t)
            for c, t in zip((c for c in self.chart.curves if len(c)), self.thin, strict=True)
        ]
        fewer = [
            f"{label}: smallest and largest of each column of {len(c):,} values"
            for label, c, t in pairs
            if len(t) < len(c)
        ]
        bad = [
            f"{self.chart.label(c)}: {len(c.not_finite)} not finite, the first at step {c.not_finite[0]:,}"
            for c in self.chart.curves
            if c.not_finite
        ]
        return fewer + bad

    def _line(self, curve: Curve, named: bool) -> Line:
        points = [(self.x(s), self.y(v)) for s, v in zip(curve.steps, curve.values, strict=True)]
        label = self.chart.label(curve)
        return Line(
            label,
            self._short(label) if named else "",
            self.chart.colour(curve),
            self.chart.dash(curve),
            "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points),
            points if len(points) <= MARKED and not curve.baseline else [],
            points[-1][1],
        )

    @staticmethod
    def _short(label: str) -> str:
        return label if len(label) <= LONGEST_LABEL else f"{label[: LONGEST_LABEL - 1]}…"


@dataclass
class Table:
    """The values of a chart: a row per step, a column per curve."""

    names: list[str]
    rows: list[tuple[str, list[str]]]
    left_out: int  # steps

    @classmethod
    def of(cls, chart: Chart) -> Table:
        """Evenly chosen rows, at most ROWS for a curve, its first and last among them."""
        curves = [curve for curve in chart.curves if len(curve)]
        chosen: set[float] = set()
        for curve in curves:
            some = np.linspace(0, len(curve) - 1, min(ROWS, len(curve))).round().astype(int)
            chosen |= set(curve.steps[some].tolist())
        known = [dict(zip(curve.steps.tolist(), curve.values.tolist(), strict=True)) for curve in curves]
        rows = [
            (
                ticks.short(step) if step % 1 else f"{step:,.0f}",
                [chart.value(k[step]) if step in k else "" for k in known],
            )
            for step in sorted(chosen)
        ]
        every = {step for k in known for step in k}
        return cls([chart.label(curve) for curve in curves], rows, len(every) - len(rows))


def _apart(lines: list[Line]) -> None:
    """Move labels apart that would lie on each other, inside the height of the chart, in the order of their curves."""
    lines.sort(key=lambda line: line.label_y)
    top, bottom = TOP + 4.0, HEIGHT - BOTTOM + 2.0
    for number, line in enumerate(lines):
        least = lines[number - 1].label_y + LABEL_HEIGHT if number else top
        line.label_y = max(line.label_y, least)
    for number, line in reversed(list(enumerate(lines))):
        most = lines[number + 1].label_y - LABEL_HEIGHT if number + 1 < len(lines) else bottom
        line.label_y = min(line.label_y, most)


def _rounded(value: float) -> float:
    """Five digits, which is more than a screen shows."""
    return float(f"{value:.5g}") if value % 1 or abs(value) >= 1e15 else int(value)
