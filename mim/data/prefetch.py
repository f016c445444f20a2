"""Remote shards are in the cache before their samples are asked for: the order is known, so is what comes next.

A `Prefetcher` stands in the place of a plan. Handing out a micro-batch tells it where the loader is; one thread of the
process that iterates it (the rank's own, not its workers) walks ahead on the same plan and fetches each shard on its
first use, so many bytes ahead as stated. What it cannot fetch it leaves to the reader, whose error is the loud one.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from mim.config import ConfigError
from mim.contracts import DataError, StorageError
from mim.data.cache import RemoteShard, ShardCache
from mim.data.order import MicroBatch, Plan, Slots

MAX_BYTES = 32 << 30  # of shards ahead of the loader; never more than half of the cache
MAX_MICRO_BATCHES = 4096  # ahead, where shards are few


class Locator(Protocol):
    """An order: positions -> samples."""

    def locate(self, positions: Sequence[int] | np.ndarray) -> Slots: ...


class Prefetcher(Collection[MicroBatch]):
    """The micro-batches of a plan, with their remote shards fetched ahead while they are handed out."""

    def __init__(
        self,
        plan: Plan,
        order: Locator,
        *,
        shards: Mapping[int, RemoteShard],  # by the number that `order` gives them; others are local
        cache: ShardCache,
        max_bytes: int = MAX_BYTES,
    ):
        self.plan = plan
        self.order = order
        self.shards = shards
        self.cache = cache
        self.max_bytes = max_bytes if cache.limit is None else min(max_bytes, cache.limit // 2)

    def __len__(self) -> int:
        return len(self.plan)

    def __contains__(self, micro: object) -> bool:
        return any(micro is other for other in self.plan)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Start anew, as a sampler does. The thread ends when the iterator is used up or closed."""
        walk = _Walk(self)
        threading.Thread(target=walk.run, name="prefetch", daemon=True).start()  # daemon: a download outlasts no exit
        try:
            for number, micro in enumerate(self.plan):
                walk.reach(number)
                yield micro
        finally:
            walk.stop()


class _Walk:
    """One thread's way along the plan, in front of the loader."""

    def __init__(self, prefetcher: Prefetcher):
        self.prefetcher = prefetcher
        self.order = copy.deepcopy(prefetcher.order)  # its memory of permutations is not for two threads
        self.cache = copy.deepcopy(prefetcher.cache)  # neither are its descriptors and connections
        self.moved = threading.Condition()
        self.reached = -1  # the micro-batch that was handed out last
        self.stopped = False
        self.last_use: dict[int, int] = {}  # shard -> micro-batch, of the shards ahead

    def reach(self, number: int) -> None:
        with self.moved:
            self.reached = number
            self.moved.notify()

    def stop(self) -> None:
        with self.moved:
            self.stopped = True
            self.moved.notify()

    def run(self) -> None:
        try:
            for number, micro in enumerate(self.prefetcher.plan):
                if number <= self.reached:  # the loader is there already
                    continue
                positions = micro.positions if len(micro.positions) else [micro.filler]
                for shard in dict.fromkeys(self.order.locate(positions).shard.tolist()):
                    if shard in self.prefetcher.shards and not self._fetch(shard, number):
                        return
        finally:
            self.cache.close()

    def _fetch(self, number_of_shard: int, number: int) -> bool:
        """Fetch a shard once it is near enough; False when the loader has ended."""
        shard = self.prefetcher.shards[number_of_shard]
        new = number_of_shard not in self.last_use
        self.last_use[number_of_shard] = number
        with self.moved:
            self.moved.wait_for(lambda: self.stopped or self._is_near(number))
        if self.stopped:
            return False
        if new:
            with contextlib.suppress(ConfigError, DataError, StorageError):  # the reader will meet it, and say so
                self.cache.fetch(shard)
        return True

    def _is_near(self, number: int) -> bool:
        """Whether the shards between the loader and a micro-batch are few enough."""
        self.last_use = {shard: use for shard, use in self.last_use.items() if use >= self.reached}
        size = sum(self.prefetcher.shards[shard].size for shard in self.last_use)
        return number <= self.reached + 1 or (
            size <= self.prefetcher.max_bytes and number - self.reached <= MAX_MICRO_BATCHES
        )
