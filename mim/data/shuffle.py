"""How well an order mixes: told at the start of a training, with a warning when shards are sorted and stay together.

Measured on the first epoch: from how many shards a batch draws, and how far apart in the stream two samples come that
are neighbours in a shard. Whether shards are sorted is seen on a few samples of the shards that are read first anyway:
their class or, without labels, the folder in their key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from mim.data.order import Slots, permutation
from mim.data.shards import Sample

BATCHES = 8  # whose shards are counted
PAIRS = 256  # of stored neighbours
SHARDS, ROWS = 4, 8  # looked into: shards, and samples of each
ALIKE, APART = (
    0.9,
    0.5,
)  # sorted: pairs of a shard are alike at least this often, pairs of two shards at most that often
POOR = 0.5  # of the shards that a full shuffle would draw from


class Located(Protocol):
    """What the report asks of an order."""

    counts: np.ndarray  # samples per shard
    chances: np.ndarray  # of each shard to own a slot
    num_samples: int
    repeats: int

    def locate(self, positions: np.ndarray) -> Slots: ...

    def find(self, samples: np.ndarray, epoch: int = 0) -> np.ndarray: ...

    def every_rank_reads_all(self, world: int) -> bool: ...

    def summary(self) -> str: ...


class Readable(Protocol):
    """What the report asks of a dataset."""

    def read(self, shard: int, row: int) -> Sample: ...


@dataclass(frozen=True)
class Mixing:
    """The report."""

    summary: str  # of the order
    num_shards: int
    shards_per_batch: float  # mean of distinct shards
    full_shuffle: float  # what it would be, if every batch were drawn from all samples
    distance: float | None  # median distance of stored neighbours in the stream, in batches; None: no shard has two
    together: float  # share of stored neighbours that come in one batch
    sorted_by: str | None  # "class" or "folder": what the samples of a shard have in common
    all_shards: bool  # each of several processes reads all of them, although the order has lanes

    @property
    def poor(self) -> bool:
        """Sorted shards whose samples the order does not spread."""
        return self.sorted_by is not None and self.shards_per_batch < POOR * self.full_shuffle

    def lines(self) -> list[str]:
        """One start line, and others when something is to be done."""
        line = f"order: {self.summary}; a batch draws from {self.shards_per_batch:.1f} of {self.num_shards} shards"
        if self.distance is not None:
            line += (
                f"; neighbours in a shard come {self.distance:.1f} batches apart (median), "
                f"{100 * self.together:.2g} % in the same batch"
            )
        if self.all_shards:
            line += "; every process reads all shards"
        if not self.poor:
            return [line]
        return [
            line,
            f"warning: the shards look sorted by {self.sorted_by}, and a batch draws from {self.shards_per_batch:.1f} "
            f"of them where a full shuffle would from {self.full_shuffle:.1f}; raise data.lanes or data.window, or "
            f"make the shards again, which shuffles them",
        ]


def report(order: Located, dataset: Readable, *, batch_size: int, world: int = 1) -> Mixing:
    """Measure an order over a dataset; reads at most 32 samples."""
    counts, slots = order.counts, max(batch_size // order.repeats, 1)
    spread = np.linspace(0, max(order.num_samples - slots, 0), BATCHES).astype(np.int64)
    drawn = [order.locate((start + np.arange(min(slots, order.num_samples))) * order.repeats).shard for start in spread]
    full = float(np.sum(1 - (1 - order.chances) ** slots))
    pairs = _neighbours(counts)
    apart = np.abs(order.find(pairs + 1) - order.find(pairs))
    return Mixing(
        summary=order.summary(),
        num_shards=int((counts > 0).sum()),
        shards_per_batch=float(np.mean([len(np.unique(shards)) for shards in drawn])),
        full_shuffle=full,
        distance=float(np.median(apart)) / slots if len(pairs) else None,
        together=float(np.mean(apart < slots)) if len(pairs) else 0.0,
        sorted_by=_sorted_by(dataset, counts, _first_shards(order, slots)),
        all_shards=order.every_rank_reads_all(world),
    )


def _first_shards(order: Located, slots: int) -> np.ndarray:
    """The shards of the first batch; when that is a single one, of as many slots as it takes to meet another."""
    while True:
        shards = np.unique(order.locate(np.arange(min(slots, order.num_samples)) * order.repeats).shard)
        if len(shards) > 1 or slots >= order.num_samples:
            return shards
        slots *= 2


def _neighbours(counts: np.ndarray) -> np.ndarray:
    """Samples, by index, that have a successor in their shard; a fixed random choice of them."""
    first = np.cumsum(counts) - counts
    shards = np.flatnonzero(counts > 1)
    if not len(shards):
        return np.empty(0, dtype=np.int64)
    picked = shards[permutation(PAIRS, "neighbours", "shards") * len(shards) // PAIRS]
    share = permutation(PAIRS, "neighbours", "rows") / PAIRS  # of the shard that comes before
    return np.unique(first[picked] + (share * (counts[picked] - 1)).astype(np.int64))


def _sorted_by(dataset: Readable, counts: np.ndarray, shards: np.ndarray) -> str | None:
    """What the samples of a shard have in common and those of two shards have not."""
    shards = shards[np.linspace(0, len(shards) - 1, min(SHARDS, len(shards))).astype(int)]
    rows = {shard: np.linspace(0, counts[shard] - 1, min(ROWS, counts[shard])).astype(int) for shard in shards.tolist()}
    samples = [(shard, dataset.read(shard, row)) for shard, picked in rows.items() for row in picked.tolist()]
    groups: dict[str, list[object]] = {
        "class": [sample.label for _, sample in samples],
        "folder": [sample.key.partition("/")[2].rpartition("/")[0] or None for _, sample in samples],
    }
    of = np.array([shard for shard, _ in samples])
    outside = of[:, None] != of
    inside = ~outside & ~np.eye(len(of), dtype=bool)
    if not (inside.any() and outside.any()):
        return None
    for name, values in groups.items():
        alike = np.array([[a is not None and a == b for b in values] for a in values])
        if alike[inside].mean() >= ALIKE and alike[outside].mean() <= APART:
            return name
    return None
