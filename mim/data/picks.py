"""A few samples of a dataset, chosen by a key: the same ones whatever the machine or the number of processes."""

from __future__ import annotations

from mim.data.order import key64


def keyed_picks(num_samples: int, count: int, purpose: str) -> list[int]:
    """Return `count` different numbers below `num_samples`, ascending; all of them when there are no more."""
    if num_samples <= count:
        return list(range(num_samples))
    picks: set[int] = set()
    draw = 0
    while len(picks) < count:
        picks.add(key64(purpose, draw) % num_samples)
        draw += 1
    return sorted(picks)
