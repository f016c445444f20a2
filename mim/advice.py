"""What the log of a run says in words: how it goes, what is wrong with it, and whether to stop."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

Line = dict[str, Any]


@dataclass(frozen=True)
class Advice:
    """One sentence about a run. `rule` is its name in docs/health.md."""

    rule: str
    severity: str  # good | note | warning | bad
    text: str


def advise(lines: list[Line], recipe: dict[str, Any]) -> list[Advice]:
    """What the lines of log.jsonl say about a run of a resolved recipe; the worst first, and never nothing.

    Lines of unknown events or without the numbers that a rule reads are passed over.
    """
    train = [line for line in lines if line.get("event") == "train"]
    found = [*not_finite(train), *data_bound(train)]
    return found or [Advice("too_early", "note", f"no verdict yet: {len(train)} log lines")]


def not_finite(train: list[Line]) -> list[Advice]:
    """The loss is no number."""
    bad = [line["step"] for line in train if not math.isfinite(line.get("loss", 0.0))]
    return [Advice("divergence", "bad", f"the loss is not finite since step {bad[0]}")] if bad else []


def data_bound(train: list[Line]) -> list[Advice]:
    """The device waits for images."""
    waits = [line["data_wait"] for line in train if "data_wait" in line][-10:]
    share = statistics.median(waits) if len(waits) >= 3 else 0.0
    if share < 0.1:
        return []
    return [Advice("data_bound", "warning", f"data-bound: {share:.0%} of the time goes by waiting for images")]
