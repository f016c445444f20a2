"""Which sample comes when: position -> (epoch, shard, row), a pure function of (dataset, seed, lanes, window, repeats).

    epoch e:   the shards, permuted by a key, concatenated into one virtual sequence of N samples
    lane l:    owns one of L contiguous slices of it; sizes differ by at most one
    inside:    each window of W samples of a lane is permuted by a key
    position:  p of the endless stream is draw p % m of slot i = p // m; epoch i // N, q = i % N,
               lane q % L, place q // L
    rank:      r of R takes the positions with (p // m) % R == r
    bad:       a slot whose sample cannot be decoded takes another of the same window: a keyed pick for each attempt

So every sample comes once per epoch (times m) for any number of processes, resuming is a seek, and the whole state of
the data is one integer. Randomness has names: what is drawn for a sample depends on (purpose, seed, epoch, sample,
draw), never on how many numbers were drawn before.

Permutations sort raw Philox words: numpy guarantees the bit stream of a generator, not the algorithm of
`Generator.permutation`, and a resumed run may meet a newer numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
from numpy.random.bit_generator import ISeedSequence

from mim.config import ConfigError

T = TypeVar("T")

ALGORITHM = "lanes-1"  # in the identity: another way to order must carry another name
FULL_SHUFFLE_BELOW = 10**7  # samples; one permutation of as many is 40 MB per worker, 200 MB while it is made
LANES, WINDOW = 64, 2048  # above it


def key64(*name: object) -> int:
    """Hash of a name, 0 <= key < 2**63: fits int64 tensors."""
    return int.from_bytes(_hash(name, 8), "little") >> 1


def rng(purpose: str, seed: int, epoch: int, sample: int, draw: int = 0) -> np.random.Generator:
    """Return the generator of one named random decision."""
    return np.random.Generator(_philox(purpose, seed, epoch, sample, draw))


def permutation(n: int, *name: object) -> np.ndarray:
    """Return the permutation of range(n) with this name. Shape (n,), int64."""
    return np.argsort(_philox(*name).random_raw(n), kind="stable")


class Slots(NamedTuple):
    """Where positions lead: int64 arrays of one shape."""

    epoch: np.ndarray
    shard: np.ndarray
    row: np.ndarray  # in the shard
    sample: np.ndarray  # index over the whole dataset, in the order of the lock
    draw: np.ndarray  # 0 <= draw < repeats


class Place(NamedTuple):
    """Where one sample lies."""

    shard: int
    row: int  # in the shard
    sample: int  # index over the whole dataset


class Order:
    """The order of the module docstring. By default one full permutation per epoch below 10^7 samples."""

    def __init__(
        self,
        dataset_id: str,
        counts: Sequence[int] | np.ndarray,  # samples per shard
        seed: int,
        lanes: int | None = None,
        window: int | None = None,
        repeats: int = 1,
    ):
        self.dataset_id = dataset_id
        self.counts = np.asarray(counts, dtype=np.int64)
        self.num_samples = int(self.counts.sum())
        self.seed = seed
        small = self.num_samples < FULL_SHUFFLE_BELOW
        self.lanes = lanes if lanes is not None else 1 if small else LANES
        self.window = window if window is not None else max(self.num_samples, 1) if small else WINDOW
        self.repeats = repeats
        if self.num_samples == 0:
            raise ConfigError("the dataset holds no samples")
        if not 1 <= self.lanes <= self.num_samples:
            raise ConfigError(f"data.lanes={self.lanes} must lie between 1 and the {self.num_samples} samples")
        for name in ("window", "repeats"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name}={getattr(self, name)} must be at least 1")
        self.chances = self.counts / self.num_samples  # of each shard to own a slot
        self._first_sample = np.cumsum(self.counts) - self.counts  # (shards,)
        self._shards: Recent[tuple[np.ndarray, np.ndarray]] = Recent(capacity=4)  # a batch straddles few epochs
        self._windows: Recent[np.ndarray] = Recent(capacity=2 * self.lanes)  # each lane in its window, or in the next

    def locate(self, positions: Sequence[int] | np.ndarray) -> Slots:
        """Map positions of the endless stream to samples."""
        slot, draw = np.divmod(np.asarray(positions, dtype=np.int64), self.repeats)
        epoch, q = np.divmod(slot, self.num_samples)
        place, lane = np.divmod(q, self.lanes)
        window, inside = np.divmod(place, self.window)
        names, group = np.unique(np.stack([epoch, lane, window]), axis=1, return_inverse=True)
        group = group.reshape(slot.shape)
        virtual = np.empty_like(slot)  # place in the epoch's virtual sequence
        for index, name in enumerate(names.T.tolist()):
            members = np.flatnonzero(group == index)
            start, permuted = self._window(*name)
            virtual[members] = start + permuted[inside[members]].astype(np.int64)
        shard, row = np.empty_like(slot), np.empty_like(slot)
        for e in np.unique(epoch).tolist():
            members = np.flatnonzero(epoch == e)
            shard[members], row[members] = self._stored(e, virtual[members])
        return Slots(epoch, shard, row, self._first_sample[shard] + row, draw)

    def substitute(self, position: int, attempt: int) -> Place:
        """Return the sample that takes the place of a bad one: another of its window, the same for every draw."""
        epoch, q = divmod(position // self.repeats, self.num_samples)
        place, lane = divmod(q, self.lanes)
        window, inside = divmod(place, self.window)
        start, permuted = self._window(epoch, lane, window)
        pick = key64("substitute", self.dataset_id, self.seed, epoch, lane, place, attempt)
        other = (inside + 1 + pick % max(len(permuted) - 1, 1)) % len(permuted)
        (shard,), (row,) = self._stored(epoch, start + permuted[[other]].astype(np.int64))
        return Place(int(shard), int(row), int(self._first_sample[shard] + row))

    def find(self, samples: np.ndarray, epoch: int = 0) -> np.ndarray:
        """The inverse of `locate`: the slots (positions / repeats) in which samples come in an epoch. Int64 (n,)."""
        shard = np.searchsorted(self._first_sample + self.counts, samples, side="right")
        order, ends = self._shard_order(epoch)
        at = np.empty_like(order)
        at[order] = np.arange(len(order))
        virtual = ends[at[shard]] - self.counts[shard] + samples - self._first_sample[shard]
        smallest, longer = divmod(self.num_samples, self.lanes)
        first = np.arange(self.lanes) * smallest + np.minimum(np.arange(self.lanes), longer)  # where lanes start
        lane = np.searchsorted(first, virtual, side="right") - 1
        window, inside = np.divmod(virtual - first[lane], self.window)
        place = np.empty_like(virtual)
        for name in set(zip(lane.tolist(), window.tolist(), strict=True)):
            members = np.flatnonzero((lane == name[0]) & (window == name[1]))
            permuted = self._window(epoch, *name)[1]
            places = np.empty(len(permuted), dtype=np.int64)
            places[permuted] = np.arange(len(places))  # the inverse
            place[members] = name[1] * self.window + places[inside[members]]
        return epoch * self.num_samples + place * self.lanes + lane

    def epoch(self, position: int) -> int:
        """How many times the stream has passed `num_samples` slots before a position."""
        return position // (self.repeats * self.num_samples)

    def every_rank_reads_all(self, world: int) -> bool:
        """Whether each of several processes draws from all lanes, so that locality is lost."""
        return world > 1 and self.lanes > 1 and math.gcd(world, self.lanes) == 1

    def summary(self) -> str:
        """The order in a few words, for people."""
        if self.lanes == 1 and self.window >= self.num_samples:
            return f"a full permutation of {self.num_samples} images per epoch"
        return f"{self.lanes} lane{'s' * (self.lanes > 1)}, windows of {self.window}"

    def identity(self) -> dict[str, str | int]:
        """What must be equal for two runs to see the same stream; JSON scalars for a checkpoint."""
        return {
            "algorithm": ALGORITHM,
            "dataset_id": self.dataset_id,
            "num_samples": self.num_samples,
            "seed": self.seed,
            "lanes": self.lanes,
            "window": self.window,
            "repeats": self.repeats,
        }

    def _stored(self, epoch: int, virtual: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return shard and row of places in an epoch's virtual sequence."""
        permuted, ends = self._shard_order(epoch)
        at = np.searchsorted(ends, virtual, side="right")
        shard = permuted[at]
        return shard, virtual - (ends[at] - self.counts[shard])

    def _window(self, epoch: int, lane: int, window: int) -> tuple[int, np.ndarray]:
        """Return where a window starts in the virtual sequence, and the permutation inside it, in the least bytes."""
        smallest, longer = divmod(self.num_samples, self.lanes)  # the first `longer` lanes have one sample more
        lane_size = smallest + (lane < longer)
        start = lane * smallest + min(lane, longer) + window * self.window
        size = min(self.window, lane_size - window * self.window)
        name = ("window", self.dataset_id, self.seed, epoch, lane, window)
        return start, self._windows.get(name, lambda: permutation(size, *name).astype(np.min_scalar_type(size)))

    def _shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the shards of an epoch's virtual sequence in order, and the places where each of them ends."""
        name = ("shards", self.dataset_id, self.seed, epoch)

        def make() -> tuple[np.ndarray, np.ndarray]:
            permuted = permutation(len(self.counts), *name)
            return permuted, np.cumsum(self.counts[permuted])

        return self._shards.get(name, make)


@dataclass(frozen=True)
class MicroBatch:
    """What one rank reads for one micro-batch."""

    positions: np.ndarray  # of its real rows, ascending; may be empty
    size: int  # rows after padding: the same in every micro-batch of a run
    filler: int  # the position that pads when there is no real row to copy
    position: int  # global positions consumed once the whole step is done


def share(batch_size: int, world: int, repeats: int = 1) -> int:
    """Largest number of rows that a rank can get in any global batch.

    A rank owns runs of `repeats` positions, one per `repeats * world`; a batch that starts with such a run holds the
    most.
    """
    rounds, rest = divmod(batch_size, repeats * world)
    return rounds * repeats + min(rest, repeats)


@dataclass(frozen=True)
class Plan:
    """The micro-batches of one rank from a position on; iterating starts anew each time, as a sampler does."""

    repeats: int
    batch_size: int  # global
    rank: int = 0
    world: int = 1
    micro_batches: int = 1  # per step
    position: int = 0  # of the first step: global positions consumed before it
    num_steps: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < self.world * self.micro_batches:
            raise ConfigError(
                f"optim.batch_size={self.batch_size} is smaller than {self.world} processes x "
                f"{self.micro_batches} micro-batches; use at least {self.world * self.micro_batches}"
            )

    @property
    def micro_size(self) -> int:
        """Rows of every micro-batch, padding included."""
        return -(-share(self.batch_size, self.world, self.repeats) // self.micro_batches)

    def __len__(self) -> int:
        return self.num_steps * self.micro_batches

    def __iter__(self) -> Iterator[MicroBatch]:
        for step in range(self.num_steps):
            start = self.position + step * self.batch_size
            end = start + self.batch_size
            positions = np.arange(start, end)
            mine = positions[(positions // self.repeats) % self.world == self.rank]
            for rows in np.array_split(mine, self.micro_batches):  # sizes differ by at most one
                yield MicroBatch(rows, self.micro_size, filler=start, position=end)


class Recent(Generic[T]):
    """The most recently used values by name."""

    def __init__(self, capacity: int):
        self.capacity = capacity
        self._values: OrderedDict[tuple, T] = OrderedDict()

    def get(self, name: tuple, make: Callable[[], T]) -> T:
        if name not in self._values:
            self._values[name] = make()
            if len(self._values) > self.capacity:
                self._values.popitem(last=False)
        self._values.move_to_end(name)
        return self._values[name]


class _Key(ISeedSequence):
    """Hands Philox its key as a seed: given as a key, it comes after entropy of the system that is then thrown away."""

    def __init__(self, name: tuple):
        self._words = np.frombuffer(_hash(name, 16), dtype="<u8")

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return self._words


def _philox(*name: object) -> np.random.Philox:
    return np.random.Philox(_Key(name))  # type: ignore[arg-type]  # the stubs forget ISeedSequence


def _hash(name: tuple, size: int) -> bytes:
    text = "/".join(map(str, name))
    return hashlib.blake2b(
        text.encode(errors="surrogateescape"), digest_size=size
    ).digest()  # names of files may hold any byte
