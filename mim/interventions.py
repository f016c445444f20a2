"""What a rollback changes about the rest of a run: positions of the stream that are left out, and a lower rate.

Rate and position are pure functions of (step, interventions), so a resumed run needs nothing but their list.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple


class Intervention(NamedTuple):
    """One rollback, as `state.json` keeps it."""

    step: int  # of the checkpoint that the run returned to: it holds from there on
    skipped: int  # positions of the stream that are left out there
    rate_factor: float  # of the learning rate from there on


Interventions = tuple[Intervention, ...]


def read(state: Iterable[dict]) -> Interventions:
    """The list of a `state.json`."""
    return tuple(Intervention(**entry) for entry in state)


def position_at(step: int, batch_size: int, interventions: Iterable[Intervention] = ()) -> int:
    """Positions of the stream that are behind a run after so many steps of `batch_size` images: used or left out."""
    return step * batch_size + sum(one.skipped for one in interventions if one.step <= step)


def rate_factor_at(step: int, interventions: Iterable[Intervention] = ()) -> float:
    """Factor of the learning rate of the update that follows so many steps."""
    return math.prod(one.rate_factor for one in interventions if one.step <= step)
