"""Several datasets drawn by weight, as one dataset and one order: pure, elastic and exact like those of a single one.

    shares:    the weights, rounded to whole slots of a block of 1000 by largest remainder
    block b:   slots [1000 b, 1000 (b + 1)) of the endless stream; a keyed permutation of the block says which source
               owns which slot, so that every block holds each source's share exactly
    source s:  has passed b * share(s) slots before block b, plus those before the slot inside it: its own position is
               arithmetic, and its own order (mim/data/order.py) does the rest

So the state stays one integer, and an epoch is each source's own: a source of half the weight and a quarter of the
images passes twice as often. Where one number is needed for the whole (durations, the log), an epoch is as many slots
as there are images.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from mim.config import ConfigError
from mim.data.cache import RemoteShard
from mim.data.order import Order, Place, Recent, Slots, permutation
from mim.data.quarantine import Bad, read_quarantine
from mim.data.shards import Dataset, Sample

ALGORITHM = "mixture-1"
BLOCK = 1000  # slots; a weight counts in thousandths


class Mixture:
    """Datasets read as one: shards and samples are numbered through, a key begins with the path of its source."""

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]):
        self.datasets = list(datasets)
        ids = [dataset.id for dataset in datasets]
        if double := next((i for i, found in enumerate(ids) if found in ids[:i]), None):
            raise ConfigError(f"data.sources names {datasets[double].path} twice; give it once, with the summed weight")
        self.shares = rounded_shares(weights)
        if empty := [dataset.path for dataset, share in zip(datasets, self.shares, strict=True) if not share]:
            raise ConfigError(f"data.sources: the weight of {empty[0]} is below 1/{2 * BLOCK} of the sum; raise it")
        content = {"algorithm": ALGORITHM, "block": BLOCK, "sources": list(zip(ids, self.shares, strict=True))}
        self.id = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.path = " + ".join(str(dataset.path) for dataset in datasets)
        self.counts = np.concatenate([dataset.counts for dataset in datasets])
        named = [dataset.classes for dataset in datasets]
        self.classes = named[0] if all(classes == named[0] for classes in named) else None  # else labels say nothing
        maps = [dataset.pixel_classes for dataset in datasets]
        self.pixel_classes = maps[0] if all(classes == maps[0] for classes in maps) else None
        self.channels, self.dtype = common_pixels(datasets)
        self.range = next(dataset.range for dataset in datasets if dataset.channels == self.channels)
        self._pool_statistics()
        self._first = np.cumsum([0] + [len(dataset.counts) for dataset in datasets])  # shard of each source, and end
        self.cache = datasets[0].cache  # one for all: it is a setting of the machine

    def __len__(self) -> int:
        return int(self.counts.sum())

    def read(self, shard: int, row: int, *, label_map: bool = False) -> Sample:
        """Read and verify one sample, as `Dataset.read`; `shard` counts through all sources."""
        source = int(np.searchsorted(self._first, shard, side="right")) - 1
        sample = self.datasets[source].read(int(shard - self._first[source]), row, label_map=label_map)
        label = sample.label if self.classes is not None else None
        return sample._replace(key=f"{self.datasets[source].path}/{sample.key}", label=label)

    def map_range(self, value_range: list[list[float]]) -> None:
        """As `Dataset.map_range`, for all sources; a gray one beside colour takes the range of the first channel."""
        for dataset in self.datasets:
            dataset.map_range(value_range if dataset.channels == self.channels else value_range[:1])
        self.range = value_range
        self._pool_statistics()

    def _pool_statistics(self) -> None:
        """Statistics per channel, and of colour read as gray, of what the stream shows."""
        per_channel = [
            (np.broadcast_to(dataset.mean, self.channels), np.broadcast_to(dataset.std, self.channels))
            for dataset in self.datasets
        ]
        mean, std = pooled(per_channel, self.shares)
        self.mean, self.std = mean.tolist(), std.tolist()
        grays = [
            {"mean": dataset.mean[0], "std": dataset.std[0]} if dataset.channels == 1 else dataset.gray
            for dataset in self.datasets
        ]
        known = [(np.array(gray["mean"]), np.array(gray["std"])) for gray in grays if gray is not None]
        self.gray: dict[str, float] | None = None
        if len(known) == len(grays):
            gray_mean, gray_std = pooled(known, self.shares)
            self.gray = {"mean": float(gray_mean), "std": float(gray_std)}

    @property
    def remote_shards(self) -> dict[int, RemoteShard]:
        """Those of all sources that are no local files, by their number in the mixture."""
        return {
            int(first) + number: shard
            for first, dataset in zip(self._first, self.datasets, strict=False)
            for number, shard in dataset.remote_shards.items()
        }

    def longest_read(self) -> float:
        """Seconds within which any read has succeeded or failed; 0 if all shards are local."""
        return max(dataset.longest_read() for dataset in self.datasets)

    def describe(self, batch_size: int, total_steps: int) -> list[str]:
        """A start line per source: its share, and what an epoch is for it."""
        lines = []
        for dataset, share in zip(self.datasets, self.shares, strict=True):
            steps = len(dataset) * BLOCK / (share * batch_size)
            lines.append(
                f"  {share / BLOCK:.1%} from {dataset.path}: {len(dataset)} images, 1 epoch of it = {steps:.1f} steps, "
                f"run = {total_steps / steps:.1f} epochs of it"
            )
        return lines


class MixtureOrder:
    """The order of the module docstring over the sources' own orders."""

    def __init__(self, mixture: Mixture, orders: Sequence[Order]):
        self.dataset_id, self.shares, self.orders = mixture.id, mixture.shares, list(orders)
        self.seed, self.repeats = orders[0].seed, orders[0].repeats
        self.counts = mixture.counts
        self.num_samples = len(mixture)
        chances = [order.chances * share / BLOCK for order, share in zip(orders, self.shares, strict=True)]
        self.chances = np.concatenate(chances)
        self._first_shard = np.cumsum([0] + [len(order.counts) for order in orders])
        self._first_sample = np.cumsum([0] + [order.num_samples for order in orders])
        self._blocks: Recent[tuple[np.ndarray, np.ndarray]] = Recent(capacity=64)

    def locate(self, positions: Sequence[int] | np.ndarray) -> Slots:
        """Map positions of the endless stream to samples; `epoch` is that of the sample's source."""
        slot, draw = np.divmod(np.asarray(positions, dtype=np.int64), self.repeats)
        source, own = self._owners(slot)
        found = Slots(*(np.empty_like(slot) for _ in Slots._fields))
        for number in np.unique(source).tolist():
            members = np.flatnonzero(source == number)
            slots = self.orders[number].locate(own[members] * self.repeats + draw[members])
            slots.shard[:] += self._first_shard[number]
            slots.sample[:] += self._first_sample[number]
            for target, values in zip(found, slots, strict=True):
                target[members] = values
        return found

    def substitute(self, position: int, attempt: int) -> Place:
        """Return the sample that takes the place of a bad one: another of the window of its source."""
        slot, draw = divmod(position, self.repeats)
        (number,), (own,) = self._owners(np.array([slot]))
        place = self.orders[number].substitute(int(own) * self.repeats + draw, attempt)
        first = int(self._first_shard[number]), int(self._first_sample[number])
        return Place(place.shard + first[0], place.row, place.sample + first[1])

    def find(self, samples: np.ndarray, epoch: int = 0) -> np.ndarray:
        """The slots in which samples come in that epoch of their source. Int64 (n,)."""
        source = np.searchsorted(self._first_sample, samples, side="right") - 1
        slot = np.empty_like(samples)
        for number in np.unique(source).tolist():
            members = np.flatnonzero(source == number)
            own = self.orders[number].find(samples[members] - self._first_sample[number], epoch)
            for at, block, rank in zip(members, *np.divmod(own, self.shares[number]), strict=True):
                inside = np.flatnonzero(self._block(int(block))[0] == number)[rank]
                slot[at] = block * BLOCK + inside
        return slot

    def epoch(self, position: int) -> int:
        """How many times the stream has passed as many slots as there are images before a position."""
        return position // (self.repeats * self.num_samples)

    def every_rank_reads_all(self, world: int) -> bool:
        """Whether each of several processes draws from all lanes: who owns a slot has nothing to do with its lane."""
        return world > 1 and any(order.lanes > 1 for order in self.orders)

    def summary(self) -> str:
        """The order in a few words, for people."""
        return f"{len(self.orders)} sources by weight, each " + " or ".join(
            dict.fromkeys(order.summary() for order in self.orders)
        )

    def identity(self) -> dict[str, Any]:
        """What must be equal for two runs to see the same stream; plain data for a checkpoint."""
        return {
            "algorithm": ALGORITHM,
            "dataset_id": self.dataset_id,
            "block": BLOCK,
            "shares": self.shares,
            "sources": [order.identity() for order in self.orders],
        }

    def _owners(self, slot: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each slot, and the slot's number among those of its source."""
        block, inside = np.divmod(slot, BLOCK)
        source, own = np.empty_like(slot), np.empty_like(slot)
        for number in np.unique(block).tolist():
            members = np.flatnonzero(block == number)
            sources, ranks = self._block(number)
            source[members] = sources[inside[members]]
            own[members] = number * np.array(self.shares)[source[members]] + ranks[inside[members]]
        return source, own

    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each slot of a block, and how many slots of the same source precede it there."""
        name = ("mixture", self.dataset_id, self.seed, block)

        def make() -> tuple[np.ndarray, np.ndarray]:
            sources = np.repeat(np.arange(len(self.shares)), self.shares)[permutation(BLOCK, *name)]  # (BLOCK,)
            ranks = np.empty_like(sources)
            for number, share in enumerate(self.shares):
                ranks[sources == number] = np.arange(share)
            return sources, ranks

        return self._blocks.get(name, make)


AnyDataset = Dataset | Mixture
AnyOrder = Order | MixtureOrder


def order_of(
    dataset: AnyDataset, *, seed: int, lanes: int | None = None, window: int | None = None, repeats: int = 1
) -> AnyOrder:
    """The order of a dataset, or of each source of a mixture."""
    datasets = dataset.datasets if isinstance(dataset, Mixture) else [dataset]
    orders = [Order(d.id, d.counts, seed=seed, lanes=lanes, window=window, repeats=repeats) for d in datasets]
    return MixtureOrder(dataset, orders) if isinstance(dataset, Mixture) else orders[0]


def bad_samples(dataset: AnyDataset) -> dict[int, Bad]:
    """The quarantine of a dataset, or of all sources of a mixture, by index over the whole."""
    if not isinstance(dataset, Mixture):
        return read_quarantine(dataset.path, dataset.id)
    found, first = {}, 0
    for source in dataset.datasets:
        for sample, bad in read_quarantine(source.path, source.id).items():
            found[first + sample] = Bad(f"{source.path}/{bad.key}", bad.reason)
        first += len(source)
    return found


def rounded_shares(weights: Sequence[float]) -> list[int]:
    """Weights -> whole slots of a block, which they fill; the largest remainders are rounded up."""
    if bad := [weight for weight in weights if not (math.isfinite(weight) and weight > 0)]:
        raise ConfigError(f"data.sources: a weight of {bad[0]} is given; weights are numbers above 0")
    exact = np.array(weights, dtype=np.float64) / sum(weights) * BLOCK
    shares = np.floor(exact + 1e-9).astype(np.int64)
    rest = BLOCK - int(shares.sum())
    shares[np.argsort(shares - exact, kind="stable")[:rest]] += 1  # equal remainders: the first source
    return shares.tolist()


def common_pixels(datasets: Sequence[Dataset]) -> tuple[int, str]:
    """Channels and type of the pixels that all sources share; gray sources may stand beside coloured ones."""
    channels = max(dataset.channels for dataset in datasets)
    if strange := [d for d in datasets if d.channels not in (1, channels)]:
        raise ConfigError(
            f"data.sources: {strange[0].path} has {strange[0].channels} channels and another source has {channels}; "
            f"a mixture takes sources of equal channels, or gray ones beside them"
        )
    if strange := [d for d in datasets if d.dtype != datasets[0].dtype]:
        raise ConfigError(
            f"data.sources: {strange[0].path} holds {strange[0].dtype} and {datasets[0].path} {datasets[0].dtype}; "
            f"a mixture takes sources of one type"
        )
    return channels, datasets[0].dtype


def pooled(parts: Sequence[tuple[np.ndarray, np.ndarray]], shares: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Pixel mean and deviation of a mixture from those of its sources, which count by their share."""
    means, deviations = (np.stack(values) for values in zip(*parts, strict=True))  # (sources, ...)
    weights = np.array(shares, dtype=np.float64).reshape(-1, *[1] * (means.ndim - 1)) / sum(shares)
    mean = (weights * means).sum(0)
    variance = (weights * (deviations**2 + means**2)).sum(0) - mean**2
    return mean.round(6), np.sqrt(np.maximum(variance, 0)).round(6)
