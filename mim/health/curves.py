"""What a run log holds, as curves over steps: the numbers that advice and pictures of a run read."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mim.schedules import to_steps

Line = dict[str, Any]
RECENT = 20  # log lines that tell how fast the run is now


@dataclass(frozen=True)
class Curve:
    """Finite values over ascending steps."""

    steps: list[int]
    values: list[float]

    def __len__(self) -> int:
        return len(self.steps)

    def since(self, step: float) -> Curve:
        """The points from a step on."""
        return self.part(sum(at < step for at in self.steps))

    def part(self, start: int) -> Curve:
        """The points from a number on."""
        return Curve(self.steps[start:], self.values[start:])

    def until(self, step: float) -> Curve:
        """The points up to a step."""
        end = sum(at <= step for at in self.steps)
        return Curve(self.steps[:end], self.values[:end])


class Curves:
    """The lines of a log.jsonl and the resolved recipe of the run, both as plain data, whatever is missing in them."""

    def __init__(self, lines: Sequence[Line], recipe: dict[str, Any]) -> None:
        self.lines = lines
        self.train = [line for line in lines if line.get("event") == "train"]
        self.recipe = recipe

    def trained(self, name: str) -> Curve:
        """A number of the training steps."""
        return _curve(self.train, name)

    def evaluated(self, evaluation: str, name: str) -> Curve:
        """A number of an evaluation."""
        return _curve([line for line in self.lines if line.get("eval") == evaluation], name)

    @property
    def probes(self) -> dict[str, Curve]:
        """Evaluations that yield a number of their own name, as kNN does: shares in [0, 1], the more the better."""
        names = dict.fromkeys(
            str(line["eval"]) for line in self.lines if line.get("event") == "eval" and "eval" in line
        )
        return {name: curve for name in names if len(curve := self.evaluated(name, name))}

    @property
    def last_step(self) -> int:
        return max((line["step"] for line in self.train), default=0)

    @property
    def warmup(self) -> int:
        """Steps of the warm-up; 0 where it is not known."""
        return self.duration("warmup") or 0

    def duration(self, key: str) -> int | None:
        """A duration of the section `optim` in steps; None where it is not known."""
        optim = self.recipe.get("optim") or {}
        sized = [line for line in self.train if line.get("epoch", 0) > 0 and "position" in line]
        if not optim.get(key) or not optim.get("batch_size") or not sized:
            return None
        num_images = round(sized[-1]["position"] / sized[-1]["epoch"])
        try:
            return to_steps(optim[key], batch_size=optim["batch_size"], num_images=num_images, where=key)
        except ValueError:
            return None

    @property
    def steps_per_day(self) -> float | None:
        """At the speed of the last log lines; None where it is not known."""
        speeds = self.trained("images_per_s").values[-RECENT:]
        batch_size = (self.recipe.get("optim") or {}).get("batch_size")
        return 86400 * statistics.median(speeds) / batch_size if speeds and batch_size else None


def _curve(lines: Sequence[Line], name: str) -> Curve:
    """The finite values of a name. Of a step that occurs twice, the last line counts."""
    found = {
        line["step"]: float(line[name])
        for line in lines
        if isinstance(line.get(name), int | float) and math.isfinite(line[name])
    }
    steps = sorted(found)
    return Curve(steps, [found[step] for step in steps])
