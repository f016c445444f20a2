"""What ranks tell each other without a collective: notes in the key-value store of their launch.

A collective needs every rank's main thread, and hangs with it. A note is read whenever another thread looks, so
signals, failures and heartbeats are told this way. With one process the notes stay in it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from mim import ranks

REPLY = timedelta(seconds=60)  # within which the store answers; its server is a thread of the launcher, or of rank 0
LOOK = 0.2  # seconds between two looks at a note that is waited for


class Board:
    """Notes by name; every rank reads and writes all of them."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        self._store, self.rank, self.world = store, rank, world

    @classmethod
    def open(cls) -> Board:
        """The board of this launch; its address is where the processes found each other."""
        rank, world = ranks.place()
        if world == 1:
            return cls(dist.HashStore(), rank, world)
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=REPLY)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")  # a launcher's store outlives its workers
        return cls(dist.PrefixStore(f"mim/{attempt}", store), rank, world)

    def put(self, name: str, text: str) -> None:
        """Write a note; an earlier one of that name is gone."""
        self._store.set(name, text)

    def first(self, name: str, text: str) -> str:
        """Write a note unless there is one; returns what stands there now."""
        return str(self._store.compare_set(name, "", text).decode())

    def get(self, name: str) -> str | None:
        return self._store.get(name).decode() if self._store.check([name]) else None

    def put_mine(self, name: str, text: str) -> None:
        """Write this rank's note of a name that every rank has one of."""
        self.put(f"{name}/{self.rank}", text)

    def of_all(self, name: str) -> list[str] | None:
        """The notes of all ranks of a name, in their order; None while one is missing."""
        names = [f"{name}/{rank}" for rank in range(self.world)]
        if not self._store.check(names):
            return None
        return [value.decode() for value in self._store.multi_get(names)]

    @contextlib.contextmanager
    def main_first(self, name: str) -> Iterator[None]:
        """Run the block on the main rank, then on all others, however long that takes; once for each name.

        Making shards of a large folder or a download may take longer than a collective waits.
        """
        while self.rank and self.get(name) is None:
            time.sleep(LOOK)
        yield
        if not self.rank:
            self.put(name, "done")
